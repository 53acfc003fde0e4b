#include "window_matcher.h"

#include <atomic>
#include <bit>
#include <limits>
#include <memory>
#include <utility>

#include "multiversion.h"
#include "parallel.h"

namespace group_sampling {
// A window in rows and blocks of columns; `box` is an index into gts or ignores.
struct BoxWindow {
  int32_t box;
  int32_t row0, row1, block0, block1;
};

// What one lattice of one image has to visit.
struct LatticePlan {
  std::vector<BoxWindow> gts;       // ascending index
  std::vector<BoxWindow> regions;   // ignore boxes
  std::vector<int32_t> band_start;  // CSR over bands: positions in band_gts
  std::vector<int32_t> band_gts;    // positions in gts, ascending in each band
  std::vector<int32_t> active_bands;
  int64_t work = 0;
};

// Ground truths that some anchor took as positive in pass 1. Several threads set the same flag. One more flag, always
// set, stands for "no ground truth", so that the loops over matches need no branch for it.
class TakenFlags {
 public:
  explicit TakenFlags(int64_t num_gts) : flags_(new std::atomic<uint8_t>[num_gts + 1]()), none_(num_gts) { take(-1); }

  void take(int32_t gt) { flags_[index(gt)].store(1, std::memory_order_relaxed); }
  bool is_taken(int32_t gt) const { return flags_[index(gt)].load(std::memory_order_relaxed) != 0; }

 private:
  int64_t index(int32_t gt) const { return gt < 0 ? none_ : gt; }

  std::unique_ptr<std::atomic<uint8_t>[]> flags_;
  int64_t none_;
};

namespace {

// Columns are visited in blocks of this many: a whole vector, without remainders. Visiting more than the window costs
// little and changes nothing, because every visited pair is decided by its IoU.
constexpr int64_t kBlock = 8;

BoxWindow in_blocks(int64_t box, const Window& window) {
  return {static_cast<int32_t>(box), static_cast<int32_t>(window.row0), static_cast<int32_t>(window.row1),
          static_cast<int32_t>(window.col0 / kBlock), static_cast<int32_t>(window.col1 / kBlock)};
}

template <typename T>
LatticePlan make_plan(const Lattice& lattice, const ImageBoxes<T>& image, T neg_iou, T ignore_ioa) {
  LatticePlan plan;
  for (int64_t j = 0; j < image.num_gts; ++j) {
    const Window window = iou_window(lattice, image.gts[j], neg_iou);
    if (window.row0 <= window.row1) plan.gts.push_back(in_blocks(j, window));
  }
  for (int64_t k = 0; k < image.num_ignores; ++k) {
    const Window window = cover_window(lattice, image.ignores[k], ignore_ioa);
    if (window.row0 <= window.row1) plan.regions.push_back(in_blocks(k, window));
  }
  if (plan.gts.empty() && plan.regions.empty()) return plan;

  const int64_t num_bands = (lattice.height + kBandRows - 1) / kBandRows;
  plan.band_start.assign(num_bands + 1, 0);
  std::vector<uint8_t> active(num_bands, 0);
  for (const auto& w : plan.gts) {
    for (int64_t band = w.row0 / kBandRows; band <= w.row1 / kBandRows; ++band) {
      ++plan.band_start[band + 1];
      active[band] = 1;
    }
    plan.work += (w.row1 - w.row0 + 1) * (w.block1 - w.block0 + 2) * kBlock;
  }
  for (const auto& w : plan.regions) {
    for (int64_t band = w.row0 / kBandRows; band <= w.row1 / kBandRows; ++band) active[band] = 1;
    plan.work += (w.row1 - w.row0 + 1) * (w.block1 - w.block0 + 2) * kBlock;
  }
  for (int64_t band = 0; band < num_bands; ++band) {
    plan.band_start[band + 1] += plan.band_start[band];
    if (active[band]) plan.active_bands.push_back(static_cast<int32_t>(band));
  }
  plan.band_gts.resize(plan.band_start[num_bands]);
  std::vector<int32_t> next(plan.band_start.begin(), plan.band_start.end() - 1);
  for (size_t i = 0; i < plan.gts.size(); ++i) {
    const auto& w = plan.gts[i];
    for (int64_t band = w.row0 / kBandRows; band <= w.row1 / kBandRows; ++band) {
      plan.band_gts[next[band]++] = static_cast<int32_t>(i);
    }
  }
  return plan;
}

// Best match of every cell of one band. All cells are zero again after each band.
template <typename T>
struct BandBuffer {
  int64_t lattice = -1;            // whose columns these are
  std::vector<T> x1, x2, width;    // anchors by column, padded to whole blocks with empty boxes
  T y1[kBandRows], y2[kBandRows];  // anchors by row of the band
  int64_t row_stride = 0;          // padded number of columns
  int64_t words = 0;               // 64-block words of `touched` for each row
  std::vector<T> iou;              // kBandRows x row_stride
  std::vector<int32_t> gt;
  std::vector<uint8_t> covered;
  std::vector<uint64_t> touched;  // one bit for each block that was visited
  std::vector<uint8_t> masks;     // of one row, see mask_blocks

  void prepare(const Lattice& grid, int64_t lattice_index, int64_t first_row) {
    if (lattice != lattice_index) {
      lattice = lattice_index;
      row_stride = (grid.width + kBlock - 1) / kBlock * kBlock;
      words = (row_stride / kBlock + 63) / 64;
      for (auto* column : {&x1, &x2, &width}) column->assign(row_stride, T(0));
      for (int64_t col = 0; col < grid.width; ++col) {
        const T shift = lattice_shift<T>(grid, col);
        x1[col] = static_cast<T>(grid.x1) + shift;
        x2[col] = static_cast<T>(grid.x2) + shift;
        width[col] = x2[col] - x1[col];
      }
      // Grows only: what is there stays zero.
      const size_t cells = static_cast<size_t>(kBandRows * row_stride);
      if (iou.size() < cells) {
        iou.resize(cells, T(0));
        gt.resize(cells, 0);
        covered.resize(cells, 0);
      }
      if (touched.size() < static_cast<size_t>(kBandRows * words)) {
        touched.resize(kBandRows * words, 0);
        masks.resize(64 * words);
      }
    }
    for (int64_t row = 0; row < kBandRows; ++row) {
      const T shift = lattice_shift<T>(grid, first_row + row);
      y1[row] = static_cast<T>(grid.y1) + shift;
      y2[row] = static_cast<T>(grid.y2) + shift;
    }
  }

  void touch(int64_t row, int64_t block0, int64_t block1) {
    uint64_t* bits = touched.data() + row * words;
    for (int64_t block = block0; block <= block1; ++block) bits[block >> 6] |= uint64_t(1) << (block & 63);
  }
};

// One row of one window: keeps the larger IoU in each column. Ground truths arrive in ascending order, so a tie stays
// with the lower index.
template <typename T>
GS_ALWAYS_INLINE void visit_columns(const T* GS_RESTRICT x1, const T* GS_RESTRICT x2, const T* GS_RESTRICT width,
                                    T anchor_height, T overlap_y, const Box<T>& gt, T gt_area, int32_t gt_index,
                                    int64_t num_blocks, T* GS_RESTRICT best_iou, int32_t* GS_RESTRICT best_gt) {
  GS_NO_ALIAS
  for (int64_t i = 0; i < num_blocks * kBlock; ++i) {
    const T intersection = overlap(x1[i], x2[i], gt.x1, gt.x2) * overlap_y;
    const T value = iou_of_areas(intersection, width[i] * anchor_height, gt_area);
    const bool better = value > best_iou[i];
    best_iou[i] = better ? value : best_iou[i];
    best_gt[i] = better ? gt_index : best_gt[i];
  }
}

template <typename T>
GS_ALWAYS_INLINE void visit_window(const BandBuffer<T>& band, int64_t row0, int64_t row1, int64_t col0,
                                   int64_t num_blocks, const Box<T>& gt, int32_t gt_index, T* iou, int32_t* best_gt) {
  const T gt_area = box_area(gt);
  for (int64_t row = row0; row <= row1; ++row) {
    const T overlap_y = overlap(band.y1[row], band.y2[row], gt.y1, gt.y2);
    const int64_t at = row * band.row_stride + col0;
    visit_columns(band.x1.data() + col0, band.x2.data() + col0, band.width.data() + col0, band.y2[row] - band.y1[row],
                  overlap_y, gt, gt_area, gt_index, num_blocks, iou + at, best_gt + at);
  }
}

GS_CPU_CLONES void visit(BandBuffer<float>& band, int64_t row0, int64_t row1, int64_t col0, int64_t num_blocks,
                         const Box<float>& gt, int32_t gt_index) {
  visit_window(band, row0, row1, col0, num_blocks, gt, gt_index, band.iou.data(), band.gt.data());
}

GS_CPU_CLONES void visit(BandBuffer<double>& band, int64_t row0, int64_t row1, int64_t col0, int64_t num_blocks,
                         const Box<double>& gt, int32_t gt_index) {
  visit_window(band, row0, row1, col0, num_blocks, gt, gt_index, band.iou.data(), band.gt.data());
}

// Which cells of each touched block of a row reach neg_iou: a bit for each column, the blocks in ascending order.
template <typename T>
GS_ALWAYS_INLINE void mask_blocks(const uint64_t* touched, int64_t words, const T* iou, T neg_iou, uint8_t* masks) {
  for (int64_t word = 0; word < words; ++word) {
    for (uint64_t bits = touched[word]; bits != 0; bits &= bits - 1) {
      const T* block = iou + (word * 64 + std::countr_zero(bits)) * kBlock;
      uint32_t mask = 0;
      for (int64_t i = 0; i < kBlock; ++i) mask |= static_cast<uint32_t>(block[i] >= neg_iou) << i;
      *masks++ = static_cast<uint8_t>(mask);
    }
  }
}

GS_CPU_CLONES void find_matches(const uint64_t* touched, int64_t words, const float* iou, float neg_iou,
                                uint8_t* masks) {
  mask_blocks(touched, words, iou, neg_iou, masks);
}

GS_CPU_CLONES void find_matches(const uint64_t* touched, int64_t words, const double* iou, double neg_iou,
                                uint8_t* masks) {
  mask_blocks(touched, words, iou, neg_iou, masks);
}

template <typename T>
void match_band(const LatticePlan& plan, const Lattice& lattice, int64_t band, const ImageBoxes<T>& image, T pos_iou,
                T neg_iou, T ignore_ioa, BandBuffer<T>& buffer, TakenFlags& taken, MatchBuffer<T>& matches) {
  const int64_t first_row = band * kBandRows;
  const int64_t last_row = std::min(first_row + kBandRows, lattice.height) - 1;
  const auto rows_in_band = [&](const BoxWindow& w) {
    return std::pair(std::max<int64_t>(w.row0, first_row) - first_row, std::min<int64_t>(w.row1, last_row) - first_row);
  };

  for (int32_t k = plan.band_start[band]; k < plan.band_start[band + 1]; ++k) {
    const BoxWindow& w = plan.gts[plan.band_gts[k]];
    const auto [row0, row1] = rows_in_band(w);
    visit(buffer, row0, row1, w.block0 * kBlock, w.block1 - w.block0 + 1, image.gts[w.box], w.box);
    for (int64_t row = row0; row <= row1; ++row) buffer.touch(row, w.block0, w.block1);
  }
  for (const BoxWindow& w : plan.regions) {
    const auto [row0, row1] = rows_in_band(w);
    for (int64_t row = row0; row <= row1; ++row) {
      for (int64_t col = w.block0 * kBlock; col < (w.block1 + 1) * kBlock; ++col) {
        const Box<T> anchor{buffer.x1[col], buffer.y1[row], buffer.x2[col], buffer.y2[row]};
        if (is_covered(anchor, image.ignores[w.box], ignore_ioa)) buffer.covered[row * buffer.row_stride + col] = 1;
      }
      buffer.touch(row, w.block0, w.block1);
    }
  }

  for (int64_t row = 0; row <= last_row - first_row; ++row) {
    uint64_t* touched = buffer.touched.data() + row * buffer.words;
    find_matches(touched, buffer.words, buffer.iou.data() + row * buffer.row_stride, neg_iou, buffer.masks.data());
    const uint8_t* mask = buffer.masks.data();
    for (int64_t word = 0; word < buffer.words; ++word) {
      for (; touched[word] != 0; touched[word] &= touched[word] - 1) {
        const int64_t col0 = (word * 64 + std::countr_zero(touched[word])) * kBlock;
        const int64_t at = row * buffer.row_stride + col0;
        const auto first_cell = static_cast<int32_t>((first_row + row) * lattice.width + col0);
        const uint32_t matched = *mask++;
        uint32_t listed = matched;
        if (!plan.regions.empty()) {
          for (int64_t i = 0; i < kBlock; ++i) listed |= static_cast<uint32_t>(buffer.covered[at + i]) << i;
          std::fill_n(buffer.covered.begin() + at, kBlock, uint8_t(0));
        }
        Match<T>* match = matches.room_for(kBlock);
        for (; listed != 0; listed &= listed - 1, ++match) {
          const int i = std::countr_zero(listed);
          const bool has_gt = (matched >> i & 1) != 0;
          const T iou = has_gt ? buffer.iou[at + i] : T(0);
          const bool positive = has_gt && iou >= pos_iou;
          *match = {first_cell + i, has_gt ? buffer.gt[at + i] : -1, iou, static_cast<int8_t>(positive ? 1 : -1)};
          taken.take(positive ? match->gt : -1);
        }
        matches.count = match - matches.data.data();
        std::fill_n(buffer.iou.begin() + at, kBlock, T(0));
      }
    }
  }
}

// Plans of all lattices of all images; plan p belongs to image p / num_lattices and lattice p % num_lattices.
template <typename T>
std::vector<LatticePlan> make_plans(const GridLayout& layout, const std::vector<ImageBoxes<T>>& images, T neg_iou,
                                    T ignore_ioa) {
  const auto num_lattices = static_cast<int64_t>(layout.lattices.size());
  const int64_t num_plans = static_cast<int64_t>(images.size()) * num_lattices;
  int64_t num_boxes = 0;
  for (const auto& image : images) num_boxes += image.num_gts + image.num_ignores;
  std::vector<LatticePlan> plans(num_plans);
  for_each_task(threads_for(num_boxes * num_lattices * 8, num_plans), num_plans, [&](int64_t, int64_t p) {
    plans[p] = make_plan(layout.lattices[p % num_lattices], images[p / num_lattices], neg_iou, ignore_ioa);
  });
  return plans;
}

}  // namespace

template <typename T>
WindowMatches<T>::WindowMatches(const GridLayout& layout, const std::vector<ImageBoxes<T>>& images,
                                const MatchOptions& options)
    : lattices_(layout.lattices), num_lattices_(static_cast<int64_t>(layout.lattices.size())) {
  const T pos_iou = static_cast<T>(options.pos_iou), neg_iou = static_cast<T>(options.neg_iou);
  const T ignore_ioa = static_cast<T>(options.ignore_ioa);
  const std::vector<LatticePlan> plans = make_plans(layout, images, neg_iou, ignore_ioa);
  const int64_t work = list_tasks(plans);
  std::vector<TakenFlags> taken;
  for (const auto& image : images) taken.emplace_back(image.num_gts);

  const auto num_tasks = static_cast<int64_t>(tasks_.size());
  const int64_t num_threads = threads_for(work, num_tasks);
  matches_.resize(num_threads);
  std::vector<BandBuffer<T>> buffers(num_threads);
  for_each_task(num_threads, num_tasks, [&](int64_t thread, int64_t t) {
    Task& task = tasks_[t];
    const int64_t image = task.plan / num_lattices_, lattice = task.plan % num_lattices_;
    buffers[thread].prepare(lattices_[lattice], lattice, task.band * kBandRows);
    task.thread = thread;
    task.begin = matches_[thread].count;
    match_band(plans[task.plan], lattices_[lattice], task.band, images[image], pos_iou, neg_iou, ignore_ioa,
               buffers[thread], taken[image], matches_[thread]);
    task.end = matches_[thread].count;
  });
  for (const auto& part : matches_) num_matches_ += part.count;

  if (options.second_pass == SecondPass::kAll) promote_all(taken);
  if (options.second_pass == SecondPass::kBest) promote_best(taken, images);
}

// One task for each band that a box reaches. Returns the work of all.
template <typename T>
int64_t WindowMatches<T>::list_tasks(const std::vector<LatticePlan>& plans) {
  int64_t work = 0;
  first_task_.reserve(plans.size() + 1);
  for (size_t p = 0; p < plans.size(); ++p) {
    first_task_.push_back(static_cast<int64_t>(tasks_.size()));
    for (const int32_t band : plans[p].active_bands) tasks_.push_back({static_cast<int64_t>(p), band, 0, 0, 0});
    work += plans[p].work;
  }
  first_task_.push_back(static_cast<int64_t>(tasks_.size()));
  return work;
}

template <typename T>
void WindowMatches<T>::promote_all(const std::vector<TakenFlags>& taken) {
  const auto num_tasks = static_cast<int64_t>(tasks_.size());
  for_each_task(threads_for(num_matches_, num_tasks), num_tasks, [&](int64_t, int64_t t) {
    const Task& task = tasks_[t];
    const TakenFlags& image_taken = taken[task.plan / num_lattices_];
    for (int64_t i = task.begin; i < task.end; ++i) {
      Match<T>& match = matches_[task.thread].data[i];
      match.label = image_taken.is_taken(match.gt) ? match.label : int8_t(1);
    }
  });
}

template <typename T>
void WindowMatches<T>::promote_best(const std::vector<TakenFlags>& taken, const std::vector<ImageBoxes<T>>& images) {
  struct Candidate {
    Match<T>* match = nullptr;
    int64_t anchor = std::numeric_limits<int64_t>::max();
  };
  for (size_t image = 0; image < images.size(); ++image) {
    std::vector<Candidate> best(images[image].num_gts);
    for (int64_t t = first_task_[image * num_lattices_]; t < first_task_[(image + 1) * num_lattices_]; ++t) {
      const Task& task = tasks_[t];
      const Lattice& lattice = lattices_[task.plan % num_lattices_];
      for (int64_t i = task.begin; i < task.end; ++i) {
        Match<T>& match = matches_[task.thread].data[i];
        if (taken[image].is_taken(match.gt)) continue;
        const int64_t anchor = anchor_of_cell(lattice, match.cell);
        Candidate& other = best[match.gt];
        if (other.match == nullptr || match.iou > other.match->iou ||
            (match.iou == other.match->iou && anchor < other.anchor)) {
          other = {&match, anchor};
        }
      }
    }
    for (const Candidate& candidate : best) {
      if (candidate.match != nullptr) candidate.match->label = 1;
    }
  }
}

template <typename T>
std::vector<BandMatches<T>> WindowMatches<T>::bands(int64_t image, int64_t lattice) const {
  const int64_t plan = image * num_lattices_ + lattice;
  std::vector<BandMatches<T>> result;
  for (int64_t t = first_task_[plan]; t < first_task_[plan + 1]; ++t) {
    if (tasks_[t].begin < tasks_[t].end) result.push_back(matches_of(tasks_[t]));
  }
  return result;
}

template class WindowMatches<float>;
template class WindowMatches<double>;

}  // namespace group_sampling
