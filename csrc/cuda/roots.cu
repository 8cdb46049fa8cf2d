// The root step on CUDA: sums, which may come from several parts of a channel, to norms.
#include "launches.h"

namespace lnprune::cuda {
namespace {

template <template <class> class Norm, class Table>
__global__ void __launch_bounds__(kThreads) root_kernel(LNPRUNE_PARAMETER(Table, table), double p) {
  const Place place = place_of_block(table, blockIdx.x);
  const RootItem& item = table.tasks[place.task].item;
  const int64_t channel = place.block * kThreads + threadIdx.x;
  if (channel >= item.channels) return;
  const Norm<double> norm(p);
  store(item.norms + channel, norm.root(load(item.sums + channel)));
}

template <class Table>
using RootKernel = void (*)(Parameter<Table>, double);

template <class Table>
RootKernel<Table> root_kernel_of(NormKind kind) {
  constexpr RootKernel<Table> kKernels[kNormKinds] = {
      root_kernel<NonzeroCount, Table>, root_kernel<Sum, Table>,
      root_kernel<SumOfSquares, Table>, root_kernel<Maximum, Table>,
      root_kernel<Minimum, Table>,      root_kernel<HalfIntegerPowerSum, Table>,
      root_kernel<PowerSum, Table>};
  return kKernels[static_cast<int>(kind)];
}

}  // namespace

cudaError_t launch_root(const Batch<RootTask>& batch, NormOrder order, cudaStream_t stream) {
  return batch.with_table([&](const auto& table) {
    using Table = std::decay_t<decltype(table)>;
    return launch(root_kernel_of<Table>(order.kind), batch.blocks, kThreads, stream, table,
                  order.p);
  });
}

}  // namespace lnprune::cuda
