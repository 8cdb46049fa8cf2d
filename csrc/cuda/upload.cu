// Tables as kernel parameters: for streams that record a graph, where host memory would have to
// outlive every replay.
#include <algorithm>

#include "launches.h"

namespace lnprune::cuda {
namespace {

// Parameters of a kernel are at most 4 KiB on every architecture.
constexpr int kWords = 480;

struct Piece {
  uint64_t words[kWords];
};

__global__ void upload_kernel(Piece piece, uint64_t* device, int words) {
  const int word = static_cast<int>(threadIdx.x);
  if (word < words) store(device + word, piece.words[word]);
}

}  // namespace

cudaError_t upload(const void* host, size_t bytes, void* device, cudaStream_t stream) {
  for (size_t at = 0; at < bytes; at += sizeof(Piece)) {
    const size_t part = std::min(sizeof(Piece), bytes - at);
    Piece piece{};
    std::memcpy(piece.words, static_cast<const char*>(host) + at, part);
    const cudaError_t error = launch(upload_kernel, 1, kWords, stream, piece,
                                     reinterpret_cast<uint64_t*>(static_cast<char*>(device) + at),
                                     static_cast<int>(part / sizeof(uint64_t)));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace lnprune::cuda
