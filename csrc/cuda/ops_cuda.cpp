// The ops on CUDA: device, stream and memory of each call. A library of its own, so that the CPU
// ops load where torch has no CUDA.
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <optional>
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

// The tickets of a stream, on which launches follow one another: zero before and after each call,
// so that one memory serves all of them. Calls of several threads take turns at enqueuing.
struct StreamTickets {
  std::mutex mutex;
  size_t count = 0;
  unsigned* memory = nullptr;
};

// Unlike its handle the number of a stream is not used again.
StreamTickets& tickets_of(int32_t device, cudaStream_t stream) {
  using Key = std::pair<int32_t, unsigned long long>;
  // Never destroyed: at the end of the process CUDA may be gone before them.
  static auto* const mutex = new std::mutex;
  static auto* const all = new std::map<Key, StreamTickets>;
  unsigned long long id = 0;
  check(cudaStreamGetId(stream, &id), "cudaStreamGetId");
  const std::lock_guard<std::mutex> lock(*mutex);
  return (*all)[{device, id}];
}

// Gives the stream at least `count` tickets, which are zero for launches that are enqueued later.
// Their memory outlives the call, so it is CUDA's own: torch's allocator may take it from a pool
// that somebody releases. Memory that became too small is kept, since launches may still use it.
// Each new one is twice as large, so all that is kept is no more than the one in use.
cudaError_t provide(StreamTickets& tickets, size_t count, cudaStream_t stream) {
  if (count <= tickets.count) return cudaSuccess;
  constexpr size_t kFewest = 1024;
  const size_t grown = std::max({2 * tickets.count, count, kFewest});
  // While a thread records a graph, CUDA refuses cudaMalloc in all threads. The relaxed mode says
  // that this thread's calls are not for that graph.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaError_t error = cudaThreadExchangeStreamCaptureMode(&mode);
  if (error != cudaSuccess) return error;
  void* memory = nullptr;
  error = cudaMalloc(&memory, grown * sizeof(unsigned));
  cudaThreadExchangeStreamCaptureMode(&mode);
  if (error == cudaSuccess) error = cudaMemsetAsync(memory, 0, grown * sizeof(unsigned), stream);
  if (error != cudaSuccess) return error;
  tickets.memory = static_cast<unsigned*>(memory);
  tickets.count = grown;
  return cudaSuccess;
}

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

  // What is enqueued on the current stream of one device.
  class Call {
   public:
    Call(int32_t device, const Steps& steps)
        : device_(device), launches_(steps), memory_(device, launches_.bytes()) {
      const torch::stable::accelerator::DeviceGuard guard(device);
      void* current = nullptr;
      LNPRUNE_CHECK_CODE(aoti_torch_get_current_cuda_stream(device, &current));
      stream_ = static_cast<cudaStream_t>(current);
      cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
      check(cudaStreamIsCapturing(stream_, &capture), "cudaStreamIsCapturing");
      if (launches_.tickets() == 0) return;
      if (capture != cudaStreamCaptureStatusNone) {
        // A graph is replayed beside other calls, on any stream: its tickets are its own.
        graph_tickets_.emplace(device, launches_.tickets() * sizeof(unsigned));
        return;
      }
      stream_tickets_ = &tickets_of(device, stream_);
      const std::lock_guard<std::mutex> lock(stream_tickets_->mutex);
      check(provide(*stream_tickets_, launches_.tickets(), stream_), "memory for tickets");
    }

    void run() {
      const torch::stable::accelerator::DeviceGuard guard(device_);
      if (stream_tickets_ == nullptr) {
        unsigned* tickets = nullptr;
        if (graph_tickets_) {
          tickets = static_cast<unsigned*>(graph_tickets_->data());
          const size_t bytes = launches_.tickets() * sizeof(unsigned);
          check(cudaMemsetAsync(tickets, 0, bytes, stream_), "cudaMemsetAsync");
        }
        check(launches_.run(memory_.data(), tickets, stream_), "a launch");
        return;
      }
      StreamTickets& tickets = *stream_tickets_;
      const std::lock_guard<std::mutex> lock(tickets.mutex);
      // The constructor took them, but a call of another thread may have failed since.
      check(provide(tickets, launches_.tickets(), stream_), "memory for tickets");
      const cudaError_t error = launches_.run(memory_.data(), tickets.memory, stream_);
      // If only some of the launches ran, counters may not be back at zero: take new ones next
      // time.
      if (error != cudaSuccess) tickets.count = 0;
      check(error, "a launch");
    }

   private:
    int32_t device_;
    cuda::Launches launches_;
    Scratch memory_;
    cudaStream_t stream_ = nullptr;
    std::optional<Scratch> graph_tickets_;     // of a call that is recorded
    StreamTickets* stream_tickets_ = nullptr;  // of any other that needs some
  };

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
