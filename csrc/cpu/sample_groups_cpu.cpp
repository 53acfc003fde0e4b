#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "../kernel.h"
#include "../sample_groups.h"
#include "draw.h"
#include "parallel.h"

namespace group_sampling {
namespace {

// Which anchor a member of a group is, and which group and member an anchor is.
class LatticeMembers {
 public:
  explicit LatticeMembers(const GridLayout& layout) : lattices_(layout.lattices), of_group_(layout.group_sizes.size()) {
    for (const Lattice& lattice : lattices_) of_group_[lattice.group].push_back(lattice);
  }

  int64_t anchor(int64_t group, uint32_t member) const {
    const auto& owned = of_group_[group];
    int64_t lattice, cell;
    locate_member(owned.data(), static_cast<int64_t>(owned.size()), group, member, &lattice, &cell);
    return anchor_of_cell(owned[lattice], cell);
  }

  // Calls visit(group, member) for an anchor; anchors must come in ascending order.
  class Cursor {
   public:
    explicit Cursor(const std::vector<Lattice>& lattices) : lattices_(lattices) {}

    template <typename Visit>
    void visit(int64_t anchor, const Visit& visit) {
      const AnchorPlace place = locate_anchor(lattices_.data(), anchor, level_);
      level_ = place.level;
      const Lattice& lattice = lattices_[place.lattice];
      visit(lattice.group, static_cast<uint32_t>(member_of_cell(lattice, place.cell)));
    }

   private:
    const std::vector<Lattice>& lattices_;
    int64_t level_ = 0;
  };

  Cursor cursor() const { return Cursor(lattices_); }

 private:
  const std::vector<Lattice>& lattices_;
  std::vector<std::vector<Lattice>> of_group_;
};

// The same for explicit group ids: members in ascending order of anchors.
class IdMembers {
 public:
  IdMembers(const int64_t* group_ids, int64_t num_anchors, int64_t num_groups)
      : group_ids_(group_ids), sizes_(num_groups, 0), first_(num_groups + 1, 0), member_of_(num_anchors) {
    for (int64_t i = 0; i < num_anchors; ++i) {
      if (in_group(i)) member_of_[i] = static_cast<uint32_t>(sizes_[group_ids[i]]++);
    }
    for (int64_t g = 0; g < num_groups; ++g) first_[g + 1] = first_[g] + sizes_[g];
    anchors_.resize(first_[num_groups]);
    for (int64_t i = 0; i < num_anchors; ++i) {
      if (in_group(i)) anchors_[first_[group_ids[i]] + member_of_[i]] = i;
    }
  }

  const std::vector<int64_t>& sizes() const { return sizes_; }
  int64_t anchor(int64_t group, uint32_t member) const { return anchors_[first_[group] + member]; }

  class Cursor {
   public:
    explicit Cursor(const IdMembers& members) : members_(members) {}

    template <typename Visit>
    void visit(int64_t anchor, const Visit& visit) const {
      if (members_.in_group(anchor)) visit(members_.group_ids_[anchor], members_.member_of_[anchor]);
    }

   private:
    const IdMembers& members_;
  };

  Cursor cursor() const { return Cursor(*this); }

 private:
  bool in_group(int64_t i) const { return group_ids_[i] >= 0 && group_ids_[i] < static_cast<int64_t>(sizes_.size()); }

  const int64_t* group_ids_;
  std::vector<int64_t> sizes_;
  std::vector<int64_t> first_;
  std::vector<uint32_t> member_of_;
  std::vector<int64_t> anchors_;
};

// What the sampler must know of one image: few anchors are not negative, so only those are listed.
struct ImageGroups {
  std::vector<std::vector<uint32_t>> positives;  // members of each group, ascending
  std::vector<int64_t> num_other;                // neither 1 nor 0, of each group
};

template <typename Members>
ImageGroups scan_labels(const int8_t* labels, int64_t num_anchors, int64_t num_groups, const Members& members) {
  ImageGroups result{std::vector<std::vector<uint32_t>>(num_groups), std::vector<int64_t>(num_groups, 0)};
  auto cursor = members.cursor();
  const auto visit = [&](int64_t anchor) {
    if (labels[anchor] == 0) return;
    cursor.visit(anchor, [&](int64_t group, uint32_t member) {
      if (labels[anchor] == 1) {
        result.positives[group].push_back(member);
      } else {
        ++result.num_other[group];
      }
    });
  };
  constexpr int64_t kWord = 8;  // labels at a time: most words are all negative
  int64_t i = 0;
  for (; i + kWord <= num_anchors; i += kWord) {
    uint64_t word;
    std::memcpy(&word, labels + i, kWord);
    if (word == 0) continue;
    for (int64_t k = 0; k < kWord; ++k) visit(i + k);
  }
  for (; i < num_anchors; ++i) visit(i);
  // Lattices of one level are interleaved, so a group that owns several of them was not visited in member order.
  for (auto& members_of_group : result.positives) {
    if (!std::is_sorted(members_of_group.begin(), members_of_group.end())) {
      std::sort(members_of_group.begin(), members_of_group.end());
    }
  }
  return result;
}

template <typename Members>
void sample_images(const SampleGroupsCall& call, const std::vector<int64_t>& group_sizes, const Members& members) {
  const int64_t num_images = call.labels.size(0), n = call.labels.size(1), num_groups = call.num_groups;
  const auto* labels = call.labels.const_data_ptr<int8_t>();
  std::vector<ImageGroups> images(num_images);
  for_each_task(threads_for(num_images * n / 8, num_images), num_images, [&](int64_t, int64_t image) {
    images[image] = scan_labels(labels + image * n, n, num_groups, members);
  });

  auto* indices = std::get<0>(call.out).mutable_data_ptr<int64_t>();
  auto* num_pos = std::get<1>(call.out).mutable_data_ptr<int64_t>();
  auto* num_neg = std::get<2>(call.out).mutable_data_ptr<int64_t>();
  const int64_t num_tasks = num_images * num_groups;
  const int64_t per_group = call.options.samples_per_group;
  for_each_task(threads_for(num_tasks * per_group * 8, num_tasks), num_tasks, [&](int64_t, int64_t task) {
    const int64_t image = task / num_groups, group = task % num_groups;
    const auto& positives = images[image].positives[group];
    const int8_t* image_labels = labels + image * n;
    int64_t* places = indices + task * per_group;
    std::fill_n(places, per_group, int64_t(-1));
    const int64_t num_negatives =
        group_sizes[group] - static_cast<int64_t>(positives.size()) - images[image].num_other[group];
    std::tie(num_pos[task], num_neg[task]) = draw_group(
        group_sizes[group], call.options, image, group, positives, num_negatives,
        [&](uint32_t member) { return image_labels[members.anchor(group, member)]; },
        [&](int64_t place, int64_t index) { places[place] = members.anchor(group, positives[index]); },
        [&](int64_t place, uint32_t member) { places[place] = members.anchor(group, member); });
  });
}

void sample_groups_cpu(const SampleGroupsCall& call) {
  if (call.group_ids.defined()) {
    const IdMembers members(call.group_ids.const_data_ptr<int64_t>(), call.group_ids.size(0), call.num_groups);
    sample_images(call, members.sizes(), members);
  } else {
    sample_images(call, call.layout.group_sizes, LatticeMembers(call.layout));
  }
}

using SampleGroupsCpu = Kernel<prepare_sample_groups, sample_groups_cpu>;

}  // namespace
}  // namespace group_sampling

TORCH_LIBRARY_IMPL(group_sampling, CPU, m) { m.impl("sample_groups", TORCH_FN(group_sampling::SampleGroupsCpu::call)); }
