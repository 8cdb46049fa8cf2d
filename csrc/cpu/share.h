// How the work of a call is shared among threads: whole items, or the tasks that items are cut
// into.
#pragma once

#include <algorithm>
#include <vector>

#include "../kernels.h"

namespace lnprune::cpu {

constexpr int64_t kTasksPerThread = 4;

// The elements that a task should have, so that there are enough tasks for all threads. A thread
// starts for `thread_elements` or more.
inline int64_t task_elements(int64_t elements, int64_t thread_elements, int64_t threads) {
  return std::max(elements / (kTasksPerThread * threads), thread_elements / kTasksPerThread);
}

// Calls body(begin, end) on ranges of [0, tasks), each at least `grain` long.
template <class Body>
void share(int64_t tasks, int64_t grain, const Threads& threads, const Body& body) {
  const auto call = [](void* context, int64_t begin, int64_t end) {
    (*static_cast<const Body*>(context))(begin, end);
  };
  threads.run(tasks, grain, call, const_cast<Body*>(&body));
}

// Calls on_item(i) for each item, on one thread unless they are worth several.
template <class OnItem>
void share_items(size_t items, bool worth_threads, const Threads& threads, const OnItem& on_item) {
  const int64_t count = static_cast<int64_t>(items);
  share(count, worth_threads ? 1 : count, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) on_item(i);
  });
}

// Calls on_task(i, task) for each task of each item i. `ends[i]` is the number of tasks that it and
// the items before it have, `elements` what all items have.
template <class OnTask>
void share_tasks(const std::vector<int64_t>& ends, int64_t elements, int64_t thread_elements,
                 const Threads& threads, const OnTask& on_task) {
  const int64_t tasks = ends.empty() ? 0 : ends.back();
  const int64_t grain = thread_elements * tasks / std::max<int64_t>(1, elements);
  share(tasks, std::max<int64_t>(1, grain), threads, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
    for (int64_t task = begin; task < end; ++task) {
      while (task >= ends[i]) ++i;
      on_task(i, i == 0 ? task : task - ends[i - 1]);
    }
  });
}

}  // namespace lnprune::cpu
