// The kernels of the rank step, and their launch. Each type of elements has a file that compiles
// its own, so that compilers work side by side.
#pragma once

#include "rank_block.h"
#include "select_block.h"

namespace lnprune::cuda {
namespace {

// Blocks that a multiprocessor should hold at once, which caps the registers.
template <class Norm, class T>
constexpr int kBlocks = Norm::kCostly || sizeof(T) == 1 ? 2 : 3;

// The select step of the last block of a tensor.
using Select = SelectBlock<kThreads, kRankKeys, 10, Channels::of_one_tile>;
static_assert(Select::kTile == kMostChannelsOfRank, "a tile holds all channels");

template <template <class> class Norm, class T, class Table>
__global__ void __launch_bounds__(kThreads, kBlocks<Norm<typename RealOf<T>::Type>, T>)
    rank_kernel(LNPRUNE_PARAMETER(Table, table), RankMemory memory, double p) {
  using Real = typename RealOf<T>::Type;
  LNPRUNE_SHARED(uint64_t, shared, kThreads* kLength<T>);
  LNPRUNE_SHARED(Select::Shared, shared_of_select, 1);
  LNPRUNE_SHARED(float, values, kHasTable<T> ? 256 : 1);
  LNPRUNE_SHARED(int, shared_last, 1);
  const Place place = place_of_block(table, blockIdx.x);
  const RankTask& task = table.tasks[place.task];
  if constexpr (kHasTable<T>) {
    values[threadIdx.x] = float8_value(task.type, threadIdx.x);
    __syncthreads();
  }
  const int block = static_cast<int>(place.block);
  const Plain read{values};
  bool finished = false;
  if (std::is_same_v<Norm<Real>, NonzeroCount<Real>> || task.counts) {
    finished = rank_block<NonzeroCount<Real>, T>(task, memory, 0, block, read, shared, shared_last);
  } else {
    finished = rank_block<Norm<Real>, T>(task, memory, p, block, read, shared, shared_last);
  }
  if (!finished || task.selection.keep == nullptr) return;
  const Work work(task, computed_again(block));
  unsigned* ticket = memory.tickets + task.selection_ticket + work.matrix;
  if (threadIdx.x == 0) shared_of_select->ranking = work.matrix;
  if (!draws_last(ticket, task.selection_strips, shared_last)) return;
  static_assert(Select::kBuckets * sizeof(unsigned) <= kThreads * kLength<T> * sizeof(uint64_t),
                "the histogram takes the place of the partials");
  auto* buckets = reinterpret_cast<unsigned*>(shared);
  Select{task.selection, buckets, nullptr, shared_of_select}.write_flags_of(0);
}

template <template <class> class Norm, class T, class Table>
__global__ void __launch_bounds__(kThreads, 1)
    scaled_rank_kernel(LNPRUNE_PARAMETER(Table, table), RankMemory memory, double p) {
  LNPRUNE_SHARED(uint64_t, shared, kThreads* kLength<T>);
  LNPRUNE_SHARED(float, values, kHasTable<T> ? 256 : 1);
  LNPRUNE_SHARED(int, shared_last, 1);
  const Place place = place_of_block(table, blockIdx.x);
  const ScaledRankTask& task = table.tasks[place.task];
  if constexpr (kHasTable<T>) {
    values[threadIdx.x] = float8_value(task.type, threadIdx.x);
    __syncthreads();
  }
  const int block = static_cast<int>(place.block);
  const Work work(task, block);
  const Scaled<T> read{values,
                       work.elements<T>(task),
                       task.scaling.factors + work.matrix * task.scaling.matrix,
                       task.scaling.place,
                       task.inner,
                       task.row};
  rank_block<Norm<double>, T>(task, memory, p, block, read, shared, shared_last);
}

template <class Table>
using RankKernel = void (*)(Parameter<Table>, RankMemory, double);

template <class T, class Table>
RankKernel<Table> kernel_of(const Batch<RankTask>&, NormKind kind) {
  constexpr RankKernel<Table> kKernels[kNormKinds] = {
      rank_kernel<NonzeroCount, T, Table>, rank_kernel<Sum, T, Table>,
      rank_kernel<SumOfSquares, T, Table>, rank_kernel<Maximum, T, Table>,
      rank_kernel<Minimum, T, Table>,      rank_kernel<HalfIntegerPowerSum, T, Table>,
      rank_kernel<PowerSum, T, Table>};
  return kKernels[static_cast<int>(kind)];
}

template <class T, class Table>
RankKernel<Table> kernel_of(const Batch<ScaledRankTask>&, NormKind kind) {
  constexpr RankKernel<Table> kKernels[kNormKinds] = {
      scaled_rank_kernel<NonzeroCount, T, Table>, scaled_rank_kernel<Sum, T, Table>,
      scaled_rank_kernel<SumOfSquares, T, Table>, scaled_rank_kernel<Maximum, T, Table>,
      scaled_rank_kernel<Minimum, T, Table>,      scaled_rank_kernel<HalfIntegerPowerSum, T, Table>,
      scaled_rank_kernel<PowerSum, T, Table>};
  return kKernels[static_cast<int>(kind)];
}

}  // namespace

template <class T, class Task>
cudaError_t launch_rank_of(const Batch<Task>& batch, NormOrder order, RankMemory memory,
                           cudaStream_t stream) {
  return batch.with_table([&](const auto& table) {
    using Table = std::decay_t<decltype(table)>;
    const RankKernel<Table> kernel = kernel_of<T, Table>(batch, order.kind);
    return launch(kernel, batch.blocks, kThreads, stream, table, memory, order.p);
  });
}

}  // namespace lnprune::cuda
