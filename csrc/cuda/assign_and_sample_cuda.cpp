// The CUDA side of the five operators: outputs, one zeroed workspace each, launches on the current stream.
// Sizes depend on shapes alone, and nothing waits for the device, so calls can be captured in a CUDA graph.
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cstring>
#include <vector>

#include "../assign_and_sample.h"
#include "../checks.h"
#include "../match_anchor_grid.h"
#include "../match_anchors.h"
#include "../pairwise_iou.h"
#include "../sample_groups.h"
#include "kernels.h"

namespace group_sampling {
namespace {

// Lays out device arrays in one allocation: reserve() them all, then allocate(), then at().
class Workspace {
 public:
  template <typename T>
  int64_t reserve(int64_t count) {
    constexpr int64_t kAlignment = 16;
    size_ = (size_ + kAlignment - 1) / kAlignment * kAlignment;
    const int64_t offset = size_;
    size_ += count * static_cast<int64_t>(sizeof(T));
    return offset;
  }

  void allocate_zeroed(const at::TensorOptions& options) { bytes_ = at::zeros({size_}, options.dtype(at::kByte)); }

  template <typename T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(static_cast<uint8_t*>(bytes_.mutable_data_ptr()) + offset);
  }

 private:
  int64_t size_ = 0;
  at::Tensor bytes_;
};

// Small host arrays that go to the device in one upload.
class HostTables {
 public:
  template <typename T>
  int64_t add(const T* data, size_t count) {
    const size_t offset = (bytes_.size() + 15) / 16 * 16;
    bytes_.resize(offset + count * sizeof(T));
    if (count > 0) std::memcpy(bytes_.data() + offset, data, count * sizeof(T));
    return static_cast<int64_t>(offset);
  }

  int64_t size() const { return static_cast<int64_t>(bytes_.size()); }
  const void* data() const { return bytes_.data(); }

 private:
  std::vector<uint8_t> bytes_;
};

// Boxes of all images in one tensor, and where each image's begin.
struct Concatenated {
  at::Tensor boxes;
  std::vector<int64_t> offsets;

  Concatenated(at::TensorList images, size_t num_images) : offsets(num_images + 1, 0) {
    for (size_t b = 0; b < images.size(); ++b) offsets[b + 1] = offsets[b] + images[b].size(0);
    if (images.size() == 1) boxes = images[0].contiguous();
    if (images.size() > 1) boxes = at::cat(images).contiguous();
  }

  template <typename T>
  cuda::BoxBatch<T> batch(const int64_t* device_offsets) const {
    const auto* data = boxes.defined() ? reinterpret_cast<const Box<T>*>(boxes.const_data_ptr<T>()) : nullptr;
    return {data, device_offsets, offsets.back()};
  }
};

// Reserves and fills in the arrays of a MatchState.
template <typename T>
class StateArrays {
 public:
  StateArrays(Workspace& workspace, int64_t num_images, int64_t num_anchors, int64_t num_gts, int64_t num_ignores,
              const MatchOptions& options)
      : num_images_(num_images), num_anchors_(num_anchors), has_ignores_(num_ignores > 0), options_(options) {
    const int64_t total = num_images * num_anchors;
    const int64_t num_rescues = options.second_pass == SecondPass::kBest ? num_gts : 0;
    best_iou_ = workspace.reserve<cuda::Bits<T>>(total);
    best_gt_key_ = workspace.reserve<int32_t>(total);
    covered_ = workspace.reserve<uint8_t>(has_ignores_ ? total : 0);
    taken_ = workspace.reserve<uint8_t>(num_gts);
    rescue_iou_ = workspace.reserve<cuda::Bits<T>>(num_rescues);
    rescue_key_ = workspace.reserve<unsigned long long>(num_rescues);
  }

  cuda::MatchState<T> state(const Workspace& workspace, const int64_t* gt_offsets) const {
    return {num_images_,
            num_anchors_,
            gt_offsets,
            workspace.at<cuda::Bits<T>>(best_iou_),
            workspace.at<int32_t>(best_gt_key_),
            has_ignores_ ? workspace.at<uint8_t>(covered_) : nullptr,
            workspace.at<uint8_t>(taken_),
            workspace.at<cuda::Bits<T>>(rescue_iou_),
            workspace.at<unsigned long long>(rescue_key_),
            static_cast<T>(options_.pos_iou),
            static_cast<T>(options_.neg_iou),
            static_cast<T>(options_.ignore_ioa),
            options_.second_pass};
  }

 private:
  int64_t num_images_, num_anchors_;
  bool has_ignores_;
  MatchOptions options_;
  int64_t best_iou_, best_gt_key_, covered_, taken_, rescue_iou_, rescue_key_;
};

// Reserves and fills in the arrays of RankBits.
class RankArrays {
 public:
  RankArrays(Workspace& workspace, int64_t num_images, int64_t num_anchors, int64_t num_groups)
      : words_(num_anchors / 32 + num_groups + 1),
        positive_(workspace.reserve<uint32_t>(num_images * words_)),
        not_negative_(workspace.reserve<uint32_t>(num_images * words_)),
        permutations_(workspace.reserve<Permutation>(num_images * num_groups)) {}

  cuda::RankBits bits(const Workspace& workspace) const {
    return {workspace.at<uint32_t>(positive_), workspace.at<uint32_t>(not_negative_), words_,
            workspace.at<Permutation>(permutations_)};
  }

 private:
  int64_t words_, positive_, not_negative_, permutations_;
};

std::vector<int64_t> prefix_sums(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> sums(sizes.size() + 1, 0);
  for (size_t i = 0; i < sizes.size(); ++i) sums[i + 1] = sums[i] + sizes[i];
  return sums;
}

at::Tensor pairwise_iou_cuda(const at::Tensor& boxes1, const at::Tensor& boxes2) {
  check_pairwise_iou(boxes1, boxes2);
  const c10::cuda::CUDAGuard guard(boxes1.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor first = boxes1.contiguous(), second = boxes2.contiguous();
  at::Tensor out = at::empty({first.size(0), second.size(0)}, first.options());
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    cuda::pairwise_iou(reinterpret_cast<const Box<T>*>(first.const_data_ptr<T>()), first.size(0),
                       reinterpret_cast<const Box<T>*>(second.const_data_ptr<T>()), second.size(0),
                       out.mutable_data_ptr<T>(), stream);
  };
  first.scalar_type() == at::kFloat ? run(float()) : run(double());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> empty_matches(at::IntArrayRef shape, const at::TensorOptions& options) {
  return {at::empty(shape, options.dtype(at::kChar)), at::empty(shape, options.dtype(at::kLong)),
          at::empty(shape, options)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> match_anchors_cuda(const at::Tensor& anchors, const at::Tensor& gt_boxes,
                                                                  const std::optional<at::Tensor>& ignore_boxes,
                                                                  double pos_iou, double neg_iou,
                                                                  std::string_view second_pass, double ignore_ioa) {
  const MatchOptions options =
      check_match_anchors(anchors, gt_boxes, ignore_boxes, pos_iou, neg_iou, second_pass, ignore_ioa);
  const c10::cuda::CUDAGuard guard(anchors.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor boxes = anchors.contiguous();
  const Concatenated gts(gt_boxes, 1);
  const Concatenated ignores(ignore_boxes.has_value() ? at::TensorList(*ignore_boxes) : at::TensorList(), 1);
  auto outputs = empty_matches({boxes.size(0)}, boxes.options());
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    Workspace workspace;
    const int64_t offsets = workspace.reserve<int64_t>(2);  // of the only image's ground truths: 0 is all that is read
    const StateArrays<T> arrays(workspace, 1, boxes.size(0), gts.offsets.back(), ignores.offsets.back(), options);
    workspace.allocate_zeroed(boxes.options());
    const auto state = arrays.state(workspace, workspace.at<int64_t>(offsets));
    cuda::match_dense(state, reinterpret_cast<const Box<T>*>(boxes.const_data_ptr<T>()), gts.batch<T>(nullptr),
                      ignores.batch<T>(nullptr), stream);
    cuda::second_pass(state, stream);
    cuda::write_matches(state, std::get<0>(outputs).mutable_data_ptr<int8_t>(),
                        std::get<1>(outputs).mutable_data_ptr<int64_t>(), std::get<2>(outputs).mutable_data_ptr<T>(),
                        stream);
  };
  boxes.scalar_type() == at::kFloat ? run(float()) : run(double());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return outputs;
}

// Matches a batch by windows and hands the state, the grid and the tables to `finish` for what is read off them.
// `reserve` adds the finisher's own arrays to the workspace.
template <typename T, typename Reserve, typename Finish>
void match_grid(const GridLayout& layout, at::TensorList gt_boxes, at::TensorList ignore_boxes,
                const MatchOptions& options, cudaStream_t stream, const Reserve& reserve, const Finish& finish) {
  const size_t num_images = gt_boxes.size();
  const Concatenated gts(gt_boxes, num_images), ignores(ignore_boxes, num_images);
  const std::vector<int64_t> group_offsets = prefix_sums(layout.group_sizes);
  HostTables tables;
  const int64_t lattices = tables.add(layout.lattices.data(), layout.lattices.size());
  const int64_t gt_offsets = tables.add(gts.offsets.data(), gts.offsets.size());
  const int64_t ignore_offsets = tables.add(ignores.offsets.data(), ignores.offsets.size());
  const int64_t groups = tables.add(group_offsets.data(), group_offsets.size());

  Workspace workspace;
  const int64_t uploaded = workspace.reserve<uint8_t>(tables.size());
  const StateArrays<T> arrays(workspace, static_cast<int64_t>(num_images), layout.num_anchors, gts.offsets.back(),
                              ignores.offsets.back(), options);
  const auto own = reserve(workspace);
  workspace.allocate_zeroed(gt_boxes[0].options());
  cuda::upload(tables.data(), tables.size(), workspace.at<uint8_t>(uploaded), stream);

  const auto state = arrays.state(workspace, workspace.at<int64_t>(uploaded + gt_offsets));
  const cuda::GridTable grid{workspace.at<Lattice>(uploaded + lattices), static_cast<int64_t>(layout.lattices.size()),
                             layout.num_anchors};
  cuda::match_windows(state, grid, gts.batch<T>(workspace.at<int64_t>(uploaded + gt_offsets)),
                      ignores.batch<T>(workspace.at<int64_t>(uploaded + ignore_offsets)), stream);
  cuda::second_pass(state, stream);
  const cuda::MemberTable members{grid,
                                  nullptr,
                                  nullptr,
                                  nullptr,
                                  workspace.at<int64_t>(uploaded + groups),
                                  static_cast<int64_t>(layout.group_sizes.size())};
  finish(workspace, own, state, members);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> match_anchor_grid_cuda(at::TensorList gt_boxes,
                                                                      at::TensorList ignore_boxes,
                                                                      at::IntArrayRef lattice_ints,
                                                                      at::ArrayRef<double> lattice_floats,
                                                                      double pos_iou, double neg_iou,
                                                                      std::string_view second_pass, double ignore_ioa) {
  constexpr const char* op = "match_anchor_grid";
  check_box_lists(op, gt_boxes, ignore_boxes);
  const MatchOptions options = check_match_options(op, pos_iou, neg_iou, second_pass, ignore_ioa);
  const GridLayout layout = check_lattices(op, lattice_ints, lattice_floats, -1);
  const c10::cuda::CUDAGuard guard(gt_boxes[0].device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  auto outputs = empty_matches({static_cast<int64_t>(gt_boxes.size()), layout.num_anchors}, gt_boxes[0].options());
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    match_grid<T>(
        layout, gt_boxes, ignore_boxes, options, stream, [](Workspace&) { return 0; },
        [&](const Workspace&, int, const cuda::MatchState<T>& state, const cuda::MemberTable&) {
          cuda::write_matches(state, std::get<0>(outputs).template mutable_data_ptr<int8_t>(),
                              std::get<1>(outputs).template mutable_data_ptr<int64_t>(),
                              std::get<2>(outputs).template mutable_data_ptr<T>(), stream);
        });
  };
  gt_boxes[0].scalar_type() == at::kFloat ? run(float()) : run(double());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return outputs;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> sample_groups_cuda(const at::Tensor& labels,
                                                                  const std::optional<at::Tensor>& group_ids,
                                                                  at::IntArrayRef lattice_ints, int64_t num_groups,
                                                                  int64_t samples_per_group, double positive_fraction,
                                                                  int64_t seed, int64_t iteration,
                                                                  int64_t first_image) {
  const GridLayout layout = check_sample_groups(labels, group_ids, lattice_ints, num_groups);
  const DrawOptions options =
      check_draw_options("sample_groups", samples_per_group, positive_fraction, seed, iteration, first_image);
  const c10::cuda::CUDAGuard guard(labels.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor image_labels = labels.contiguous();
  const int64_t num_images = labels.size(0), n = labels.size(1);
  const auto long_options = labels.options().dtype(at::kLong);
  at::Tensor indices = at::empty({num_images, num_groups, samples_per_group}, long_options);
  at::Tensor num_pos = at::empty({num_images, num_groups}, long_options);
  at::Tensor num_neg = at::empty({num_images, num_groups}, long_options);

  HostTables tables;
  const std::vector<int64_t> group_offsets = prefix_sums(layout.group_sizes);
  const int64_t lattices = tables.add(layout.lattices.data(), layout.lattices.size());
  const int64_t groups = tables.add(group_offsets.data(), group_offsets.size());
  Workspace workspace;
  const int64_t uploaded = workspace.reserve<uint8_t>(tables.size());
  const RankArrays ranks(workspace, num_images, n, num_groups);
  const int64_t num_ids = group_ids.has_value() ? n : 0;
  const int64_t id_blocks = (num_ids + cuda::kIdBlock - 1) / cuda::kIdBlock;
  const int64_t counts = workspace.reserve<int32_t>(id_blocks * num_groups);
  const int64_t member_of = workspace.reserve<int32_t>(num_ids);
  const int64_t members = workspace.reserve<int64_t>(num_ids);
  const int64_t id_offsets = workspace.reserve<int64_t>(num_groups + 1);
  workspace.allocate_zeroed(labels.options());

  cuda::MemberTable table{};
  table.num_groups = num_groups;
  at::Tensor ids;
  if (group_ids.has_value()) {
    ids = group_ids->contiguous();
    table.group_ids = ids.const_data_ptr<int64_t>();
    table.member_of = workspace.at<int32_t>(member_of);
    table.members = workspace.at<int64_t>(members);
    table.group_offsets = workspace.at<int64_t>(id_offsets);
    cuda::number_members(table.group_ids, n, num_groups, workspace.at<int32_t>(counts),
                         workspace.at<int32_t>(member_of), workspace.at<int64_t>(members),
                         workspace.at<int64_t>(id_offsets), stream);
  } else {
    cuda::upload(tables.data(), tables.size(), workspace.at<uint8_t>(uploaded), stream);
    table.grid = {workspace.at<Lattice>(uploaded + lattices), static_cast<int64_t>(layout.lattices.size()), n};
    table.group_offsets = workspace.at<int64_t>(uploaded + groups);
  }
  cuda::sample_labels(image_labels.const_data_ptr<int8_t>(), num_images, n, table, ranks.bits(workspace), options,
                      {indices.mutable_data_ptr<int64_t>(), nullptr, nullptr, num_pos.mutable_data_ptr<int64_t>(),
                       num_neg.mutable_data_ptr<int64_t>()},
                      stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {indices, num_pos, num_neg};
}

AssignResult assign_and_sample_cuda(at::TensorList gt_boxes, at::TensorList ignore_boxes, at::IntArrayRef lattice_ints,
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
  const c10::cuda::CUDAGuard guard(gt_boxes[0].device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto num_images = static_cast<int64_t>(gt_boxes.size());
  const auto long_options = gt_boxes[0].options().dtype(at::kLong);
  at::Tensor indices = at::empty({num_images, num_groups, samples_per_group}, long_options);
  at::Tensor labels = at::empty({num_images, num_groups, samples_per_group}, long_options.dtype(at::kChar));
  at::Tensor matched_gt = at::empty({num_images, num_groups, samples_per_group}, long_options);
  at::Tensor num_pos = at::empty({num_images, num_groups}, long_options);
  at::Tensor num_neg = at::empty({num_images, num_groups}, long_options);
  const cuda::SampleOutput out{indices.mutable_data_ptr<int64_t>(), labels.mutable_data_ptr<int8_t>(),
                               matched_gt.mutable_data_ptr<int64_t>(), num_pos.mutable_data_ptr<int64_t>(),
                               num_neg.mutable_data_ptr<int64_t>()};
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    match_grid<T>(
        layout, gt_boxes, ignore_boxes, match_options, stream,
        [&](Workspace& workspace) { return RankArrays(workspace, num_images, layout.num_anchors, num_groups); },
        [&](const Workspace& workspace, const RankArrays& ranks, const cuda::MatchState<T>& state,
            const cuda::MemberTable& members) {
          cuda::sample_matches(state, members, ranks.bits(workspace), draw_options, out, stream);
        });
  };
  gt_boxes[0].scalar_type() == at::kFloat ? run(float()) : run(double());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {indices, labels, matched_gt, num_pos, num_neg};
}

}  // namespace
}  // namespace group_sampling

TORCH_LIBRARY_IMPL(group_sampling, CUDA, m) {
  using namespace group_sampling;
  m.impl("pairwise_iou", TORCH_FN(pairwise_iou_cuda));
  m.impl("match_anchors", TORCH_FN(match_anchors_cuda));
  m.impl("match_anchor_grid", TORCH_FN(match_anchor_grid_cuda));
  m.impl("sample_groups", TORCH_FN(sample_groups_cuda));
  m.impl("assign_and_sample", TORCH_FN(assign_and_sample_cuda));
}
