#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "../sample_groups.h"
#include "draw.h"
#include "parallel.h"

namespace group_sampling {
namespace {

// Which anchor a member of a group is, and which group and member an anchor is.
class LatticeMembers {
 public:
  explicit LatticeMembers(const GridLayout& layout) : lattices_(layout.lattices), of_group_(layout.group_sizes.size()) {
    for (const Lattice& lattice : lattices_) of_group_[lattice.group].push_back(&lattice);
  }

  int64_t anchor(int64_t group, uint32_t member) const {
    const auto& owned = of_group_[group];
    size_t i = owned.size() - 1;
    while (owned[i]->first_member > member) --i;
    return owned[i]->start + owned[i]->step * (member - owned[i]->first_member);
  }

  // Calls visit(group, member) for an anchor; anchors must come in ascending order.
  class Cursor {
   public:
    explicit Cursor(const std::vector<Lattice>& lattices) : lattices_(lattices) {}

    template <typename Visit>
    void visit(int64_t anchor, const Visit& visit) {
      while (anchor - lattices_[level_].start >= level_size()) level_ += lattices_[level_].step;
      const int64_t in_level = anchor - lattices_[level_].start, step = lattices_[level_].step;
      const Lattice& lattice = lattices_[level_ + in_level % step];
      visit(lattice.group, static_cast<uint32_t>(lattice.first_member + in_level / step));
    }

   private:
    int64_t level_size() const {
      const Lattice& first = lattices_[level_];
      return first.step * first.height * first.width;
    }

    const std::vector<Lattice>& lattices_;
    int64_t level_ = 0;  // index of its first lattice
  };

  Cursor cursor() const { return Cursor(lattices_); }

 private:
  const std::vector<Lattice>& lattices_;
  std::vector<std::vector<const Lattice*>> of_group_;
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
void run(const at::Tensor& labels, const std::vector<int64_t>& group_sizes, const Members& members,
         const DrawOptions& options, int64_t* indices, int64_t* num_pos, int64_t* num_neg) {
  const int64_t num_images = labels.size(0), n = labels.size(1);
  const auto num_groups = static_cast<int64_t>(group_sizes.size());
  const auto* label_data = labels.const_data_ptr<int8_t>();
  std::vector<ImageGroups> images(num_images);
  for_each_task(threads_for(num_images * n / 8, num_images), num_images, [&](int64_t, int64_t image) {
    images[image] = scan_labels(label_data + image * n, n, num_groups, members);
  });

  const int64_t num_tasks = num_images * num_groups;
  const int64_t per_group = options.samples_per_group;
  for_each_task(threads_for(num_tasks * per_group * 8, num_tasks), num_tasks, [&](int64_t, int64_t task) {
    const int64_t image = task / num_groups, group = task % num_groups;
    const auto& positives = images[image].positives[group];
    const int8_t* image_labels = label_data + image * n;
    int64_t* places = indices + task * per_group;
    std::fill_n(places, per_group, int64_t(-1));
    const int64_t num_negatives =
        group_sizes[group] - static_cast<int64_t>(positives.size()) - images[image].num_other[group];
    std::tie(num_pos[task], num_neg[task]) = draw_group(
        group_sizes[group], options, image, group, positives, num_negatives,
        [&](uint32_t member) { return image_labels[members.anchor(group, member)]; },
        [&](int64_t place, int64_t index) { places[place] = members.anchor(group, positives[index]); },
        [&](int64_t place, uint32_t member) { places[place] = members.anchor(group, member); });
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> sample_groups_cpu(const at::Tensor& labels,
                                                                 const std::optional<at::Tensor>& group_ids,
                                                                 at::IntArrayRef lattice_ints, int64_t num_groups,
                                                                 int64_t samples_per_group, double positive_fraction,
                                                                 int64_t seed, int64_t iteration, int64_t first_image) {
  const GridLayout layout = check_sample_groups(labels, group_ids, lattice_ints, num_groups);
  const DrawOptions options =
      check_draw_options("sample_groups", samples_per_group, positive_fraction, seed, iteration, first_image);
  const auto long_options = labels.options().dtype(at::kLong);
  const int64_t num_images = labels.size(0);
  at::Tensor indices = at::empty({num_images, num_groups, samples_per_group}, long_options);
  at::Tensor num_pos = at::empty({num_images, num_groups}, long_options);
  at::Tensor num_neg = at::empty({num_images, num_groups}, long_options);
  const at::Tensor image_labels = labels.contiguous();
  auto* index_data = indices.mutable_data_ptr<int64_t>();
  auto* pos_data = num_pos.mutable_data_ptr<int64_t>();
  auto* neg_data = num_neg.mutable_data_ptr<int64_t>();
  if (group_ids.has_value()) {
    const at::Tensor ids = group_ids->contiguous();
    const IdMembers members(ids.const_data_ptr<int64_t>(), ids.size(0), num_groups);
    run(image_labels, members.sizes(), members, options, index_data, pos_data, neg_data);
  } else {
    run(image_labels, layout.group_sizes, LatticeMembers(layout), options, index_data, pos_data, neg_data);
  }
  return {indices, num_pos, num_neg};
}

}  // namespace
}  // namespace group_sampling

TORCH_LIBRARY_IMPL(group_sampling, CPU, m) { m.impl("sample_groups", TORCH_FN(group_sampling::sample_groups_cpu)); }
