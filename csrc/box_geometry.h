// Scalar geometry of boxes, shared by the CPU and the CUDA kernels so that both return the same bits.
// Build with -ffp-contract=off and --fmad=false: a fused multiply-add rounds once where this code rounds twice.
#pragma once

#if defined(__CUDACC__) || defined(__HIPCC__)
#define GS_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// Forced, so that the loops of cpu/ that are compiled once per instruction set take it along into each of them.
#define GS_HOST_DEVICE inline __attribute__((always_inline))
#else
#define GS_HOST_DEVICE inline
#endif

namespace group_sampling {

// Corner-form box in input pixels: (x1, y1) top-left, (x2, y2) bottom-right, width = x2 - x1.
template <typename T>
struct Box {
  T x1, y1, x2, y2;
};

// Length of the overlap of the intervals [low_a, high_a] and [low_b, high_b]; 0 when they are disjoint or NaN.
template <typename T>
GS_HOST_DEVICE T overlap(T low_a, T high_a, T low_b, T high_b) {
  const T low = low_a > low_b ? low_a : low_b;
  const T high = high_a < high_b ? high_a : high_b;
  const T length = high - low;
  return length > T(0) ? length : T(0);
}

// IoU from an intersection and two areas. A box that is not finite has an area that is not, which makes this 0 or
// compares the union false; an empty or inverted box has no intersection: invalid boxes need no case of their own.
template <typename T>
GS_HOST_DEVICE T iou_of_areas(T intersection, T area_a, T area_b) {
  const T area = area_a + area_b - intersection;
  const bool positive = area > T(0);
  const T quotient = intersection / (positive ? area : T(1));  // without a branch, so that loops over it vectorise
  return positive ? quotient : T(0);
}

template <typename T>
GS_HOST_DEVICE T box_area(const Box<T>& box) {
  return (box.x2 - box.x1) * (box.y2 - box.y1);
}

template <typename T>
GS_HOST_DEVICE T intersection_area(const Box<T>& a, const Box<T>& b) {
  return overlap(a.x1, a.x2, b.x1, b.x2) * overlap(a.y1, a.y2, b.y1, b.y2);
}

template <typename T>
GS_HOST_DEVICE T iou(const Box<T>& a, const Box<T>& b) {
  return iou_of_areas(intersection_area(a, b), box_area(a), box_area(b));
}

// Whether `region`, which must be valid, covers at least `min_share` of the anchor's area.
template <typename T>
GS_HOST_DEVICE bool is_covered(const Box<T>& anchor, const Box<T>& region, T min_share) {
  const T area = box_area(anchor);
  return area > T(0) && intersection_area(anchor, region) / area >= min_share;
}

// Finite, x2 > x1 and y2 > y1. x - x is 0 for finite numbers and NaN for all others.
template <typename T>
GS_HOST_DEVICE bool is_valid(const Box<T>& box) {
  const bool finite =
      box.x1 - box.x1 == T(0) && box.y1 - box.y1 == T(0) && box.x2 - box.x2 == T(0) && box.y2 - box.y2 == T(0);
  return finite && box.x2 > box.x1 && box.y2 > box.y1;
}

}  // namespace group_sampling
