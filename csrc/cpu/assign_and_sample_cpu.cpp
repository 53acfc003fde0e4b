#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../assign_and_sample.h"
#include "../kernel.h"
#include "draw.h"
#include "parallel.h"
#include "tensor_boxes.h"
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

// Where one group of one image is written: N places each.
struct Places {
  int64_t* indices;
  int8_t* labels;
  int64_t* matched_gt;
};

template <typename T>
std::pair<int64_t, int64_t> sample_group(const GridLayout& layout, const WindowMatches<T>& matches,
                                         const DrawOptions& options, int64_t image, int64_t group, const Places& out) {
  std::vector<Lattice> lattices;
  std::vector<CellLabels<T>> labels;
  std::vector<uint32_t> positives;  // members; ascending: lattice by lattice, band by band, cell by cell
  std::vector<int32_t> positive_gts;
  int64_t num_matched = 0;
  for (size_t l = 0; l < layout.lattices.size(); ++l) {
    const Lattice& lattice = layout.lattices[l];
    if (lattice.group != group || num_cells(lattice) == 0) continue;
    const auto bands = matches.bands(image, static_cast<int64_t>(l));
    lattices.push_back(lattice);
    labels.emplace_back(lattice, bands);
    for (const auto& band : bands) {
      num_matched += band.end - band.begin;
      for (const Match<T>* match = band.begin; match != band.end; ++match) {
        if (match->label != 1) continue;
        positives.push_back(static_cast<uint32_t>(member_of_cell(lattice, match->cell)));
        positive_gts.push_back(match->gt);
      }
    }
  }
  const auto locate = [&](uint32_t member, int64_t* lattice, int64_t* cell) {
    locate_member(lattices.data(), static_cast<int64_t>(lattices.size()), group, member, lattice, cell);
  };
  const auto anchor = [&](uint32_t member) {
    int64_t lattice, cell;
    locate(member, &lattice, &cell);
    return anchor_of_cell(lattices[lattice], cell);
  };

  std::fill_n(out.indices, options.samples_per_group, int64_t(-1));
  std::fill_n(out.labels, options.samples_per_group, int8_t(-1));
  std::fill_n(out.matched_gt, options.samples_per_group, int64_t(-1));
  return draw_group(
      layout.group_sizes[group], options, image, group, positives, layout.group_sizes[group] - num_matched,
      [&](uint32_t member) {
        int64_t lattice, cell;
        locate(member, &lattice, &cell);
        return labels[lattice].label(static_cast<uint32_t>(cell));
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
void match_and_sample(const AssignAndSampleCall& call) {
  const auto images = image_boxes<T>(call.gt_boxes, call.ignore_boxes);
  const WindowMatches<T> matches(call.layout, images, call.match_options);
  auto* indices = std::get<0>(call.out).mutable_data_ptr<int64_t>();
  auto* labels = std::get<1>(call.out).mutable_data_ptr<int8_t>();
  auto* matched_gt = std::get<2>(call.out).mutable_data_ptr<int64_t>();
  auto* num_pos = std::get<3>(call.out).mutable_data_ptr<int64_t>();
  auto* num_neg = std::get<4>(call.out).mutable_data_ptr<int64_t>();
  const auto num_groups = static_cast<int64_t>(call.layout.group_sizes.size());
  const int64_t num_tasks = static_cast<int64_t>(images.size()) * num_groups;
  const int64_t per_group = call.draw_options.samples_per_group;
  const int64_t work = num_tasks * per_group * 8 + matches.num_matches() * 2;
  for_each_task(threads_for(work, num_tasks), num_tasks, [&](int64_t, int64_t task) {
    const int64_t first = task * per_group;
    std::tie(num_pos[task], num_neg[task]) =
        sample_group(call.layout, matches, call.draw_options, task / num_groups, task % num_groups,
                     {indices + first, labels + first, matched_gt + first});
  });
}

void assign_and_sample_cpu(const AssignAndSampleCall& call) {
  AT_DISPATCH_FLOATING_TYPES(call.gt_boxes[0].scalar_type(), "assign_and_sample",
                             [&] { match_and_sample<scalar_t>(call); });
}

using AssignAndSampleCpu = Kernel<prepare_assign_and_sample, assign_and_sample_cpu>;

}  // namespace
}  // namespace group_sampling

TORCH_LIBRARY_IMPL(group_sampling, CPU, m) {
  m.impl("assign_and_sample", TORCH_FN(group_sampling::AssignAndSampleCpu::call));
}
