// The rank step of bfloat16.
#include "rank_kernels.h"

namespace lnprune::cuda {

template cudaError_t launch_rank_of<c10::BFloat16>(const Batch<RankTask>&, NormOrder, RankMemory,
                                                   cudaStream_t);
template cudaError_t launch_rank_of<c10::BFloat16>(const Batch<ScaledRankTask>&, NormOrder,
                                                   RankMemory, cudaStream_t);

}  // namespace lnprune::cuda
