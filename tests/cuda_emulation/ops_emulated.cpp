// The ops on the emulated GPU, for CPU tensors, under a name of their own; and the emulation's
// knobs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <mutex>

#include "../../csrc/cuda/launches.h"
#include "../../csrc/ops.h"

namespace lnprune {
namespace {

// Kept from call to call, as on a stream: every call must leave zeros.
std::vector<unsigned> tickets;

struct EmulatedBackend {
  static int32_t device_type() { return aoti_torch_device_type_cpu(); }

  // As little is known of fresh memory on a GPU.
  class Scratch {
   public:
    Scratch(int32_t, size_t bytes) : bytes_((bytes + 7) / 8, 0xfff4deadbeefdeadull) {}
    void* data() { return bytes_.data(); }

   private:
    std::vector<uint64_t> bytes_;
  };

  class Call {
   public:
    Call(int32_t, const Steps& steps) : launches_(steps), memory_(0, launches_.bytes()) {}

    void run() {
      static std::mutex one_launch_at_a_time;
      const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
      if (tickets.size() < launches_.tickets()) tickets.resize(launches_.tickets());
      const cudaError_t error = launches_.run(memory_.data(), tickets.data(), nullptr);
      const bool drawn = std::count(tickets.begin(), tickets.end(), 0u) != tickets.size();
      if (error != cudaSuccess || drawn) tickets.clear();
      STD_TORCH_CHECK(error == cudaSuccess, "emulated launch: ", emulation::error_message());
      STD_TORCH_CHECK(!drawn, "emulated launch: tickets that are not zero at its end");
    }

   private:
    cuda::Launches launches_;
    Scratch memory_;
  };

  static void prepare_output(void*, size_t) {}
  static size_t first_unwritable(void* const*, size_t count) { return count; }
};

// A call that only notes what happens on which device, and finds no memory on one of them.
struct NotedCall {
  static inline std::vector<std::string> notes;
  static inline int32_t full;

  NotedCall(int32_t device, const Steps&) : device(device) {
    notes.push_back("takes " + std::to_string(device));
    STD_TORCH_CHECK(device != full, "no memory on device ", device);
  }
  void run() { notes.push_back("runs " + std::to_string(device)); }

  int32_t device;
};

std::vector<std::string> calls_on(int32_t devices, int32_t full) {
  NotedCall::notes.clear();
  NotedCall::full = full;
  StepsByDevice steps;
  for (int32_t device = 0; device < devices; ++device) steps[device];
  try {
    run_calls<NotedCall>(steps);
  } catch (const std::exception&) {
    NotedCall::notes.push_back("fails");
  }
  return NotedCall::notes;
}

pybind11::dict read_meter() {
  const emulation::Meter& meter = emulation::meter();
  pybind11::dict found;
  found["launches"] = meter.launches;
  found["bytes_read"] = meter.bytes_read;
  found["bytes_written"] = meter.bytes_written;
  found["sectors_read"] = meter.sectors_read;
  found["sectors_written"] = meter.sectors_written;
  found["cached_sectors"] = meter.cached_sectors;
  return found;
}

}  // namespace
}  // namespace lnprune

STABLE_TORCH_LIBRARY(lnprune_emulated, library) { lnprune::define_ops(library); }

STABLE_TORCH_LIBRARY_IMPL(lnprune_emulated, CPU, library) {
  LNPRUNE_IMPLEMENT_OPS(library, lnprune::EmulatedBackend);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("set_schedule", [](int schedule, uint64_t seed) {
    lnprune::emulation::set_schedule(static_cast<lnprune::emulation::Schedule>(schedule), seed);
  });
  m.def("calls_on", &lnprune::calls_on);
  m.attr("schedules") = lnprune::emulation::kSchedules;
  m.def("start_metering", [] {
    lnprune::emulation::meter() = {};
    lnprune::emulation::set_metering(true);
  });
  m.def("stop_metering", [] {
    lnprune::emulation::set_metering(false);
    return lnprune::read_meter();
  });
}
