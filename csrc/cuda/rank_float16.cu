// The rank step of float16.
#include "rank_kernels.h"

namespace lnprune::cuda {

template cudaError_t launch_rank_of<c10::Half>(const Batch<RankTask>&, NormOrder, RankMemory,
                                               cudaStream_t);
template cudaError_t launch_rank_of<c10::Half>(const Batch<ScaledRankTask>&, NormOrder, RankMemory,
                                               cudaStream_t);

}  // namespace lnprune::cuda
