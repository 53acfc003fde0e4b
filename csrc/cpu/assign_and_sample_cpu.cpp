#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../assign_and_sample.h"
#include "../checks.h"
#include "batch_boxes.h"
#include "draw.h"
#include "parallel.h"
#include "window_matcher.h"

namespace group_sampling {
namespace {

// Labels of the cells of one lattice, kept as bits for the bands that have matches.
template <typename T>
class CellLabels {
 public:
  CellLabels(const Lattice& lattice, const std::vector<BandMatches<T>>& bands)
      : band_cells_(static_cast<uint32_t>(std::min(kBandRows, lattice.height) * lattice.width)),
        band_words_((band_cells_ + 63) / 64),
        first_word_((lattice.height + kBandRows - 1) / kBandRows, -1),
        matched_(band_words_ * bands.size(), 0),
        positive_(band_words_ * bands.size(), 0) {
    for (size_t i = 0; i < bands.size(); ++i) {
      const uint32_t band = static_cast<uint32_t>(bands[i].begin->cell) / band_cells_;
      const int64_t first = band_words_ * static_cast<int64_t>(i);
      first_word_[band] = first;
      for (const Match<T>* match = bands[i].begin; match != bands[i].end; ++match) {
        const uint32_t bit = static_cast<uint32_t>(match->cell) - band * band_cells_;
        matched_[first + (bit >> 6)] |= uint64_t(1) << (bit & 63);
        positive_[first + (bit >> 6)] |= uint64_t(match->label == 1) << (bit & 63);
      }
    }
  }

  int8_t label(uint32_t cell) const {
    const uint32_t band = cell / band_cells_, bit = cell - band * band_cells_;
    const int64_t word = first_word_[band] + (bit >> 6);
    if (first_word_[band] < 0 || (matched_[word] >> (bit & 63) & 1) == 0) return 0;
    return (positive_[word] >> (bit & 63) & 1) != 0 ? 1 : -1;
  }

 private:
  uint32_t band_cells_;
  int64_t band_words_;
  std::vector<int64_t> first_word_;  // of each band, -1 without matches
  std::vector<uint64_t> matched_, positive_;
};

struct Output {
  int64_t* indices;
  int8_t* labels;
  int64_t* matched_gt;
};

// Draws one group of one image; out points at its N places.
template <typename T>
std::pair<int64_t, int64_t> sample_group(const GridLayout& layout, const WindowMatches<T>& matches,
                                         const DrawOptions& options, int64_t image, int64_t group, const Output& out) {
  std::vector<const Lattice*> lattices;
  std::vector<CellLabels<T>> labels;
  std::vector<uint32_t> positives;  // members; ascending: lattice by lattice, band by band, cell by cell
  std::vector<int32_t> positive_gts;
  int64_t num_matched = 0;
  for (size_t l = 0; l < layout.lattices.size(); ++l) {
    const Lattice& lattice = layout.lattices[l];
    if (lattice.group != group || lattice.height * lattice.width == 0) continue;
    const auto bands = matches.bands(image, static_cast<int64_t>(l));
    lattices.push_back(&lattice);
    labels.emplace_back(lattice, bands);
    for (const auto& band : bands) {
      num_matched += band.end - band.begin;
      for (const Match<T>* match = band.begin; match != band.end; ++match) {
        if (match->label != 1) continue;
        positives.push_back(static_cast<uint32_t>(lattice.first_member + match->cell));
        positive_gts.push_back(match->gt);
      }
    }
  }
  const auto lattice_of = [&](uint32_t member) {
    size_t i = lattices.size() - 1;
    while (lattices[i]->first_member > member) --i;
    return i;
  };
  const auto anchor = [&](uint32_t member) {
    const Lattice& lattice = *lattices[lattice_of(member)];
    return lattice.start + lattice.step * (member - lattice.first_member);
  };

  std::fill_n(out.indices, options.samples_per_group, int64_t(-1));
  std::fill_n(out.labels, options.samples_per_group, int8_t(-1));
  std::fill_n(out.matched_gt, options.samples_per_group, int64_t(-1));
  return draw_group(
      layout.group_sizes[group], options, image, group, positives, layout.group_sizes[group] - num_matched,
      [&](uint32_t member) {
        const size_t i = lattice_of(member);
        return labels[i].label(member - static_cast<uint32_t>(lattices[i]->first_member));
      },
      [&](int64_t place, int64_t index) {
        out.indices[place] = anchor(positives[index]);
        out.labels[place] = 1;
        out.matched_gt[place] = positive_gts[index];
      },
      [&](int64_t place, uint32_t member) {
        out.indices[place] = anchor(member);
        out.labels[place] = 0;
      });
}

template <typename T>
void run(const GridLayout& layout, at::TensorList gt_boxes, at::TensorList ignore_boxes,
         const MatchOptions& match_options, const DrawOptions& draw_options, const Output& out, int64_t* num_pos,
         int64_t* num_neg) {
  const BatchBoxes<T> batch(gt_boxes, ignore_boxes);
  const WindowMatches<T> matches(layout, batch.images, match_options);
  const auto num_groups = static_cast<int64_t>(layout.group_sizes.size());
  const int64_t num_tasks = static_cast<int64_t>(batch.images.size()) * num_groups;
  const int64_t work = num_tasks * draw_options.samples_per_group * 8 + matches.num_matches() * 2;
  for_each_task(threads_for(work, num_tasks), num_tasks, [&](int64_t, int64_t task) {
    const int64_t first = task * draw_options.samples_per_group;
    std::tie(num_pos[task], num_neg[task]) =
        sample_group(layout, matches, draw_options, task / num_groups, task % num_groups,
                     {out.indices + first, out.labels + first, out.matched_gt + first});
  });
}

AssignResult assign_and_sample_cpu(at::TensorList gt_boxes, at::TensorList ignore_boxes, at::IntArrayRef lattice_ints,
                                   at::ArrayRef<double> lattice_floats, int64_t num_groups, int64_t samples_per_group,
                                   double positive_fraction, int64_t seed, int64_t iteration, int64_t first_image,
                                   double pos_iou, double neg_iou, std::string_view second_pass, double ignore_ioa) {
  constexpr const char* op = "assign_and_sample";
  check_box_lists(op, gt_boxes, ignore_boxes);
  const MatchOptions match_options = check_match_options(op, pos_iou, neg_iou, second_pass, ignore_ioa);
  const DrawOptions draw_options =
      check_draw_options(op, samples_per_group, positive_fraction, seed, iteration, first_image);
  TORCH_CHECK_VALUE(num_groups >= 0, op, ": num_groups must not be negative, got ", num_groups);
  const GridLayout layout = check_lattices(op, lattice_ints, lattice_floats, num_groups);
  const auto num_images = static_cast<int64_t>(gt_boxes.size());
  const auto long_options = gt_boxes[0].options().dtype(at::kLong);
  at::Tensor indices = at::empty({num_images, num_groups, samples_per_group}, long_options);
  at::Tensor labels = at::empty({num_images, num_groups, samples_per_group}, long_options.dtype(at::kChar));
  at::Tensor matched_gt = at::empty({num_images, num_groups, samples_per_group}, long_options);
  at::Tensor num_pos = at::empty({num_images, num_groups}, long_options);
  at::Tensor num_neg = at::empty({num_images, num_groups}, long_options);
  const Output out{indices.mutable_data_ptr<int64_t>(), labels.mutable_data_ptr<int8_t>(),
                   matched_gt.mutable_data_ptr<int64_t>()};
  auto* pos_data = num_pos.mutable_data_ptr<int64_t>();
  auto* neg_data = num_neg.mutable_data_ptr<int64_t>();
  if (gt_boxes[0].scalar_type() == at::kFloat) {
    run<float>(layout, gt_boxes, ignore_boxes, match_options, draw_options, out, pos_data, neg_data);
  } else {
    run<double>(layout, gt_boxes, ignore_boxes, match_options, draw_options, out, pos_data, neg_data);
  }
  return {indices, labels, matched_gt, num_pos, num_neg};
}

}  // namespace
}  // namespace group_sampling

TORCH_LIBRARY_IMPL(group_sampling, CPU, m) {
  m.impl("assign_and_sample", TORCH_FN(group_sampling::assign_and_sample_cpu));
}
