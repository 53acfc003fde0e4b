// Scalar geometry of boxes, shared by the CPU and the CUDA kernels so that both return the same bits.
// Build with -ffp-contract=off and --fmad=false: a fused multiply-add rounds once where this code rounds twice.
#pragma once

#include <limits>

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

// What a block of anchors has in common: no box outside it reaches a given IoU with any of them.
template <typename T>
struct Reach {
  T x1, y1, x2, y2;      // hull of the anchors
  T min_area, max_area;  // of the anchors; after widen_areas, of a box
};

template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

template <typename T>
GS_HOST_DEVICE Reach<T> empty_reach() {
  return {kInfinity<T>, kInfinity<T>, -kInfinity<T>, -kInfinity<T>, kInfinity<T>, T(0)};
}

// An invalid anchor reaches nothing.
template <typename T>
GS_HOST_DEVICE void extend_reach(Reach<T>& reach, const Box<T>& anchor) {
  if (!is_valid(anchor)) return;
  const T area = box_area(anchor);
  reach.x1 = anchor.x1 < reach.x1 ? anchor.x1 : reach.x1, reach.y1 = anchor.y1 < reach.y1 ? anchor.y1 : reach.y1;
  reach.x2 = anchor.x2 > reach.x2 ? anchor.x2 : reach.x2, reach.y2 = anchor.y2 > reach.y2 ? anchor.y2 : reach.y2;
  reach.min_area = area < reach.min_area ? area : reach.min_area;
  reach.max_area = area > reach.max_area ? area : reach.max_area;
}

// The intersection is at most either area, so areas differ by at most 1 / min_iou; 1e-5 covers rounding, and areas so
// small or large that they lose precision are not bounded.
template <typename T>
GS_HOST_DEVICE void widen_areas(Reach<T>& reach, T min_iou) {
  const double low = static_cast<double>(min_iou) * static_cast<double>(reach.min_area) * (1.0 - 1e-5);
  const double high = static_cast<double>(reach.max_area) / static_cast<double>(min_iou) * (1.0 + 1e-5);
  reach.min_area = low > 1e-30 && low < 1e30 ? static_cast<T>(low) : T(0);
  reach.max_area = high > 1e-30 && high < 1e30 ? static_cast<T>(high) : kInfinity<T>;
}

template <typename T>
GS_HOST_DEVICE bool meets_hull(const Reach<T>& reach, const Box<T>& box) {
  return (box.x1 < reach.x2) & (box.x2 > reach.x1) & (box.y1 < reach.y2) & (box.y2 > reach.y1);
}

template <typename T>
GS_HOST_DEVICE bool has_near_area(const Reach<T>& reach, T area) {
  return (area >= reach.min_area) & (area <= reach.max_area);
}

}  // namespace group_sampling
