// Windowed matching on the CPU: the few anchors of a grid that are not negative, without touching the others.
#pragma once

#include <cstdint>
#include <vector>

#include "../grid_layout.h"
#include "../options.h"

namespace group_sampling {

// Boxes of one image.
template <typename T>
struct ImageBoxes {
  const Box<T>* gts;
  int64_t num_gts;
  const Box<T>* ignores;
  int64_t num_ignores;
};

// One anchor that is positive or ignored.
template <typename T>
struct Match {
  int32_t cell;  // of its lattice
  int32_t gt;    // best ground truth; -1 for a negative that an ignore box covers
  T iou;         // with gt; 0 without
  int8_t label;  // 1 or -1
};

// Matches of one thread; grows in steps, and a whole block of columns may be written past `count`.
template <typename T>
struct MatchBuffer {
  std::vector<Match<T>> data;
  int64_t count = 0;

  Match<T>* room_for(int64_t more) {
    if (static_cast<int64_t>(data.size()) < count + more) data.resize(2 * data.size() + 256);
    return data.data() + count;
  }
};

// Matches of a horizontal band of a lattice, in ascending order of cells.
template <typename T>
struct BandMatches {
  const Match<T>* begin;
  const Match<T>* end;
};

constexpr int64_t kBandRows = 16;

struct LatticePlan;
class TakenFlags;

template <typename T>
class WindowMatches {
 public:
  // `layout` must outlive the object.
  WindowMatches(const GridLayout& layout, const std::vector<ImageBoxes<T>>& images, const MatchOptions& options);

  // Bands of one lattice of one image that hold matches, top to bottom.
  std::vector<BandMatches<T>> bands(int64_t image, int64_t lattice) const;
  int64_t num_matches() const { return num_matches_; }

 private:
  struct Task {
    int64_t plan, band;
    int64_t thread, begin, end;  // where its matches are
  };

  int64_t list_tasks(const std::vector<LatticePlan>& plans);
  void promote_all(const std::vector<TakenFlags>& taken);
  void promote_best(const std::vector<TakenFlags>& taken, const std::vector<ImageBoxes<T>>& images);

  BandMatches<T> matches_of(const Task& task) const {
    const Match<T>* data = matches_[task.thread].data.data();
    return {data + task.begin, data + task.end};
  }

  const std::vector<Lattice>& lattices_;
  int64_t num_lattices_;
  int64_t num_matches_ = 0;
  std::vector<MatchBuffer<T>> matches_;  // of each thread
  std::vector<Task> tasks_;              // sorted by plan (image * num_lattices + lattice), then band
  std::vector<int64_t> first_task_;      // of each plan, and one past the last
};

extern template class WindowMatches<float>;
extern template class WindowMatches<double>;

}  // namespace group_sampling
