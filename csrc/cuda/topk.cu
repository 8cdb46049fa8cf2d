// The select step on CUDA of rankings that the rank step leaves: norms from elsewhere, and tensors
// of more channels than one block should select from while others wait.
#include "launches.h"
#include "select_block.h"

namespace lnprune::cuda {
namespace {

using Block = SelectBlock<kSelectThreads, kSelectKeys, 11, Channels::any>;
static_assert(Block::kTile == kSelectTile, "a block writes the flags of a tile");

template <class Table>
__global__ void __launch_bounds__(kSelectThreads) select_kernel(LNPRUNE_PARAMETER(Table, table)) {
  LNPRUNE_SHARED(unsigned, buckets, Block::kBuckets);
  LNPRUNE_SHARED(RankingKey, survivors, Block::kSurvivors);
  LNPRUNE_SHARED(Block::Shared, shared, 1);
  const Place place = place_of_block(table, blockIdx.x);
  const SelectTask& task = table.tasks[place.task];
  const int64_t tiles = select_tiles(task.item);
  const int64_t ranking = task.item.rankings == 1 ? 0 : place.block / tiles;
  if (threadIdx.x == 0) shared->ranking = static_cast<int>(ranking);
  __syncthreads();
  Block{task.item, buckets, survivors, shared}.write_flags_of(place.block - ranking * tiles);
}

}  // namespace

cudaError_t launch_select(const Batch<SelectTask>& batch, cudaStream_t stream) {
  return batch.with_table([&](const auto& table) {
    using Table = std::decay_t<decltype(table)>;
    return launch(select_kernel<Table>, batch.blocks, kSelectThreads, stream, table);
  });
}

}  // namespace lnprune::cuda
