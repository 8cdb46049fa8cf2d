// The ops on CUDA: device, stream and memory of each call. A library of its own, so that the CPU
// ops load where torch has no CUDA.
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

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

// From torch's allocator on the current stream: reused in its order.
Tensor new_bytes(int32_t device, size_t bytes) {
  const int64_t size = static_cast<int64_t>(bytes);
  const int64_t stride = 1;
  AtenTensorHandle handle = nullptr;
  LNPRUNE_CHECK_CODE(aoti_torch_empty_strided(1, &size, &stride, aoti_torch_dtype_uint8(),
                                              aoti_torch_device_type_cuda(), device, &handle));
  return Tensor(handle);
}

// The tickets of a stream, on which calls follow one another: zero between any two, so that one
// memory serves all of them.
class Tickets {
 public:
  Tickets(int32_t device, cudaStream_t stream) : device_(device), stream_(stream) {
    // Unlike its handle the number of a stream is not used again.
    check(cudaStreamGetId(stream, &id_), "cudaStreamGetId");
  }

  // At least `count` zeros. Memory that another thread replaces meanwhile lives as long as the
  // result.
  Tensor get(size_t count) const {
    constexpr size_t kFewest = 1024;
    const size_t bytes = std::max(2 * count, kFewest) * sizeof(unsigned);
    const std::lock_guard<std::mutex> lock(store().mutex);
    const auto found = store().tensors.find({device_, id_});
    if (found != store().tensors.end() &&
        found->second.numel() >= static_cast<int64_t>(count * sizeof(unsigned))) {
      return found->second;
    }
    Tensor zeros = new_bytes(device_, bytes);
    check(cudaMemsetAsync(zeros.mutable_data_ptr(), 0, bytes, stream_), "cudaMemsetAsync");
    store().tensors.insert_or_assign({device_, id_}, zeros);
    return zeros;
  }

  // After launches of which some did not run, and tickets of theirs may be drawn.
  void forget() const {
    const std::lock_guard<std::mutex> lock(store().mutex);
    store().tensors.erase({device_, id_});
  }

 private:
  struct Store {
    std::mutex mutex;
    std::map<std::pair<int32_t, unsigned long long>, Tensor> tensors;
  };

  // Never destroyed: at the end of the process CUDA may be gone before it.
  static Store& store() {
    static Store* const store = new Store;
    return *store;
  }

  int32_t device_;
  cudaStream_t stream_;
  unsigned long long id_ = 0;
};

struct CudaBackend {
  static int32_t device_type() { return aoti_torch_device_type_cuda(); }

  // Freed at the end of the call.
  class Scratch {
   public:
    Scratch(int32_t device, size_t bytes) : bytes_(new_bytes(device, bytes)) {}
    void* data() { return bytes_.mutable_data_ptr(); }

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

    cuda::Launches launches(steps);
    const size_t ticket_bytes = launches.tickets() * sizeof(unsigned);
    if (capture != cudaStreamCaptureStatusNone) {
      // A graph is replayed beside other calls, on any stream: its tickets are its own.
      Scratch memory(device, launches.bytes() + ticket_bytes);
      auto* tickets =
          reinterpret_cast<unsigned*>(static_cast<char*>(memory.data()) + launches.bytes());
      if (ticket_bytes > 0) {
        check(cudaMemsetAsync(tickets, 0, ticket_bytes, stream), "cudaMemsetAsync");
      }
      check(launches.run(memory.data(), tickets, stream), "a launch");
      return;
    }
    Scratch memory(device, launches.bytes());
    if (ticket_bytes == 0) {
      check(launches.run(memory.data(), nullptr, stream), "a launch");
      return;
    }
    const Tickets tickets(device, stream);
    Tensor zeros = tickets.get(launches.tickets());
    const cudaError_t error =
        launches.run(memory.data(), static_cast<unsigned*>(zeros.mutable_data_ptr()), stream);
    if (error != cudaSuccess) tickets.forget();
    check(error, "a launch");
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
