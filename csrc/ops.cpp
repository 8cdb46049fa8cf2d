// The ops on the CPU, and the pybind11 module that registers them.
#include "ops.h"

#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include <memory>

namespace lnprune {
namespace {

void run_tasks(int64_t tasks, int64_t grain, cpu::Body body, void* context) {
  if (tasks <= grain) {
    if (tasks > 0) body(context, 0, tasks);
    return;
  }
  torch::stable::parallel_for(0, tasks, grain,
                              [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

struct CpuBackend {
  static int32_t device_type() { return aoti_torch_device_type_cpu(); }

  class Call {
   public:
    Call(int32_t, const Steps& steps) : steps_(&steps) {}
    void run() { cpu::run(*steps_, {torch::stable::get_num_threads(), run_tasks}); }

   private:
    const Steps* steps_;
  };

  class Scratch {
   public:
    Scratch(int32_t, size_t bytes) : bytes_(new double[(bytes + 7) / 8]) {}
    void* data() const { return bytes_.get(); }

   private:
    std::unique_ptr<double[]> bytes_;
  };

  static void prepare_output(void* block, size_t bytes) { cpu::advise_huge_pages(block, bytes); }
  static size_t first_unwritable(void* const* blocks, size_t count) {
    return cpu::first_unwritable(blocks, count);
  }
};

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = std::to_string(TORCH_VERSION_MAJOR) + "." + std::to_string(TORCH_VERSION_MINOR) +
                  "." + std::to_string(TORCH_VERSION_PATCH);
  info["compiler"] = __VERSION__;
  info["instruction_set"] = cpu::instruction_set();
  return info;
}

// How many tasks each step makes of a tensor, by its name.
pybind11::dict task_counts(int64_t outer, int64_t channels, int64_t inner, int64_t threads) {
  const Slices slices{1, outer, channels, inner};
  pybind11::dict counts;
  counts["rank"] = cpu::rank_tasks(slices, threads);
  counts["write"] = cpu::write_tasks(slices, threads);
  counts["zero"] = cpu::zero_tasks(slices, threads);
  return counts;
}

size_t first_unwritable(const pybind11::list& addresses) {
  std::vector<void*> blocks;
  for (const auto& address : addresses) {
    blocks.push_back(reinterpret_cast<void*>(address.cast<uintptr_t>()));
  }
  return cpu::first_unwritable(blocks.data(), blocks.size());
}

}  // namespace
}  // namespace lnprune

STABLE_TORCH_LIBRARY(lnprune, library) { lnprune::define_ops(library); }

STABLE_TORCH_LIBRARY_IMPL(lnprune, CPU, library) {
  LNPRUNE_IMPLEMENT_OPS(library, lnprune::CpuBackend);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("build_info", &lnprune::build_info);
  m.def("task_counts", &lnprune::task_counts);
  m.def("first_unwritable", &lnprune::first_unwritable);
}
