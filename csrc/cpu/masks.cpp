// The write step on the CPU: each mask and masked weight in one pass, in parts shared among
// threads.
#include <algorithm>
#include <vector>

#include "instruction_sets.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lnprune::cpu {
namespace {

constexpr int64_t kBytes[kElementTypes] = {8, 4, 2, 2, 1, 1, 1, 1};
// Elements of a task: large enough to amortise its start, small enough to share evenly.
constexpr int64_t kTaskElements = 32768;

// A task is a range of rows and of columns. Where channels are runs, the tensor counts as one row.
struct Cutting {
  int64_t rows;
  int64_t columns;
  int64_t rows_per_task;
  int64_t columns_per_task;
  int64_t strips;
  int64_t tasks;
  int64_t first_task;
};

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

Cutting cut(const Slices& slices) {
  Cutting cutting{};
  if (slices.inner < kShortestRun) {
    cutting.rows = slices.outer;
    cutting.columns = slices.row();
    cutting.columns_per_task = kColumns / slices.inner * slices.inner;
    cutting.rows_per_task =
        std::max<int64_t>(1, kTaskElements / std::min(cutting.columns, cutting.columns_per_task));
  } else {
    cutting.rows = 1;
    cutting.columns = slices.elements();
    cutting.columns_per_task = kTaskElements;
    cutting.rows_per_task = 1;
  }
  cutting.strips = divide_up(cutting.columns, cutting.columns_per_task);
  cutting.tasks = cutting.strips * divide_up(cutting.rows, cutting.rows_per_task);
  return cutting;
}

struct Job {
  const WriteItem* items;
  const Cutting* cuttings;
};

WritePart part_at(const WriteItem& item, int64_t element) {
  const int64_t offset = element * kBytes[static_cast<int>(item.type)];
  const auto at = [offset](const void* base) -> const void* {
    return base == nullptr ? nullptr : static_cast<const char*>(base) + offset;
  };
  const auto into = [offset](void* base) -> void* {
    return base == nullptr ? nullptr : static_cast<char*>(base) + offset;
  };
  return {at(item.mask), at(item.original), into(item.new_mask), into(item.weight)};
}

void write_tasks(void* context, int64_t begin, int64_t end) {
  const Job& job = *static_cast<const Job*>(context);
  size_t i = 0;
  for (int64_t task = begin; task < end; ++task) {
    while (task >= job.cuttings[i].first_task + job.cuttings[i].tasks) ++i;
    const WriteItem& item = job.items[i];
    const Cutting& cutting = job.cuttings[i];
    const int64_t inner = item.slices.inner;
    const int64_t local = task - cutting.first_task;
    const int64_t row = local / cutting.strips * cutting.rows_per_task;
    const int64_t column = local % cutting.strips * cutting.columns_per_task;
    const int64_t columns = std::min(cutting.columns_per_task, cutting.columns - column);
    const int type = static_cast<int>(item.type);
    if (inner < kShortestRun) {
      instructions().write_columns[type](part_at(item, row * cutting.columns + column),
                                         std::min(cutting.rows_per_task, cutting.rows - row),
                                         cutting.columns, columns, inner,
                                         item.keep + column / inner);
      continue;
    }
    for (int64_t position = column; position < column + columns;) {
      const int64_t run = position / inner;
      const int64_t length = std::min((run + 1) * inner, column + columns) - position;
      instructions().write_run[type](part_at(item, position), length,
                                     item.keep[run % item.slices.channels]);
      position += length;
    }
  }
}

}  // namespace

void write(const WriteItem* items, size_t count, ParallelFor parallel_for) {
  std::vector<Cutting> cuttings(count);
  int64_t tasks = 0;
  int64_t elements = 0;
  for (size_t i = 0; i < count; ++i) {
    cuttings[i] = cut(items[i].slices);
    cuttings[i].first_task = tasks;
    tasks += cuttings[i].tasks;
    elements += items[i].slices.elements();
  }
  Job job{items, cuttings.data()};
  // So that no thread starts for less than some ten microseconds of work.
  const int64_t grain = std::max<int64_t>(1, 32768 * tasks / std::max<int64_t>(1, elements));
  parallel_for(tasks, grain, write_tasks, &job);
}

void advise_huge_pages(void* block, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const uintptr_t address = reinterpret_cast<uintptr_t>(block);
  const uintptr_t begin = (address + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (address + bytes) & ~(kHugePage - 1);
  // Advice only: where it is refused the block is as usable as before.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)block;
  (void)bytes;
#endif
}

}  // namespace lnprune::cpu
