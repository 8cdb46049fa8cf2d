// The rank step of every float8.
#include "rank_kernels.h"

namespace lnprune::cuda {

template cudaError_t launch_rank_of<Float8>(const Batch<RankTask>&, NormOrder, RankMemory,
                                            cudaStream_t);
template cudaError_t launch_rank_of<Float8>(const Batch<ScaledRankTask>&, NormOrder, RankMemory,
                                            cudaStream_t);

}  // namespace lnprune::cuda
