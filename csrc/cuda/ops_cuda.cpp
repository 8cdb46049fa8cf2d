// The ops on CUDA: device, stream and memory of each call. A library of its own, so that the CPU
// ops load where torch has no CUDA.
#include <torch/csrc/stable/accelerator.h>

#include "../ops.h"
#include "launches.h"

namespace lnprune {
namespace {

// An error is reported here, and not once more by whoever next asks CUDA for its last one.
void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "lnprune: CUDA error in ", what, ": ",
                  cudaGetErrorString(error));
}

Tensor new_bytes(size_t bytes, int32_t device_type, int32_t device, bool pinned) {
  const int64_t size = static_cast<int64_t>(bytes);
  const int64_t stride = 1;
  AtenTensorHandle handle = nullptr;
  LNPRUNE_CHECK_CODE((pinned ? aoti_torch_empty_strided_pinned : aoti_torch_empty_strided)(
      1, &size, &stride, aoti_torch_dtype_uint8(), device_type, device, &handle));
  return Tensor(handle);
}

struct CudaBackend {
  static int32_t device_type() { return aoti_torch_device_type_cuda(); }

  // From torch's allocator on the current stream: freed at the end of the call, reused in its
  // order.
  class Scratch {
   public:
    Scratch(int32_t device, size_t bytes)
        : bytes_(new_bytes(bytes, aoti_torch_device_type_cuda(), device, false)) {}
    void* data() { return bytes_.mutable_data_ptr(); }
    const Tensor& tensor() const { return bytes_; }

   private:
    Tensor bytes_;
  };

  static void run(int32_t device, const Steps& steps) {
    const torch::stable::accelerator::DeviceGuard guard(device);
    void* current = nullptr;
    LNPRUNE_CHECK_CODE(aoti_torch_get_current_cuda_stream(device, &current));
    const cudaStream_t stream = static_cast<cudaStream_t>(current);
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(stream, &capture), "cudaStreamIsCapturing");

    const cuda::Launches launches(steps);
    Scratch memory(device, launches.bytes());
    if (capture == cudaStreamCaptureStatusNone) {
      // Pinned memory of torch's allocator, which reuses it only when the copy has ended.
      Tensor table = new_bytes(launches.table_bytes(), aoti_torch_device_type_cpu(), 0, true);
      launches.write_table(table.mutable_data_ptr(), memory.data());
      Tensor begin = torch::stable::narrow(const_cast<Tensor&>(memory.tensor()), 0, 0,
                                           static_cast<int64_t>(launches.table_bytes()));
      torch::stable::copy_(begin, table, true);
    } else {
      // A captured copy would read this host memory at every replay; parameters stay in the graph.
      std::vector<char> table(launches.table_bytes());
      launches.write_table(table.data(), memory.data());
      check(cuda::upload(table.data(), table.size(), memory.data(), stream), "a launch");
    }
    check(launches.run(memory.data(), stream), "a launch");
  }

  static void prepare_output(void*, size_t) {}
  static size_t first_unwritable(void* const*, size_t count) { return count; }
};

}  // namespace
}  // namespace lnprune

extern "C" __attribute__((visibility("default"))) int lnprune_cuda_version() {
  return CUDART_VERSION;
}

STABLE_TORCH_LIBRARY_IMPL(lnprune, CUDA, library) {
  LNPRUNE_IMPLEMENT_OPS(library, lnprune::CudaBackend);
}
