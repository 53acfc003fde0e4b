// Tasks of unequal size over the intra-op threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

namespace group_sampling {

// Number of threads worth waking for `work` elementary steps of a few nanoseconds. Waking costs microseconds on a calm
// machine, and milliseconds on a busy one, where the last thread to get a core holds up all. So work that is done
// within about two milliseconds stays on one thread: windows and draws of one image take 141,000 steps with 1,000 faces
// on 360,000 anchors, 273,000 with 1,968; eight images of 1,000 faces take 1.1 million and are worth a second thread.
constexpr int64_t kWorkPerThread = 262144;

inline int64_t threads_for(int64_t work, int64_t num_tasks) {
  if (at::in_parallel_region()) return 1;
  return std::max<int64_t>(1,
                           std::min({static_cast<int64_t>(at::get_num_threads()), num_tasks, work / kWorkPerThread}));
}

// Calls body(thread, task) for every task in [0, num_tasks). Threads fetch tasks as they become free, so which thread
// runs a task is not determined: results must go to places that the task alone decides.
template <typename Body>
void for_each_task(int64_t num_threads, int64_t num_tasks, const Body& body) {
  if (num_threads <= 1) {
    for (int64_t task = 0; task < num_tasks; ++task) body(int64_t(0), task);
    return;
  }
  std::atomic<int64_t> next{0};
  at::parallel_for(0, num_threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t task = next++; task < num_tasks; task = next++) body(thread, task);
    }
  });
}

// Calls body(begin, end) for ranges that cover [0, count), of `work` steps in all.
template <typename Body>
void for_each_range(int64_t work, int64_t count, const Body& body) {
  const int64_t num_threads = threads_for(work, count);
  if (num_threads <= 1) {
    body(int64_t(0), count);
    return;
  }
  at::parallel_for(0, count, (count + num_threads - 1) / num_threads, body);
}

}  // namespace group_sampling
