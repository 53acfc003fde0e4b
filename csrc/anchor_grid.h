// Anchors as translated base boxes: where an anchor and a member of a group sit, from a cell to its box, from a ground
// truth to the window of cells it can reach.
#pragma once

#include <cstdint>

#include "box_geometry.h"

namespace group_sampling {

// One base box over one feature map. The anchor of cell = row * width + col sits at flat index start + step * cell and
// at position first_member + cell of its group. All lattices of a level have the same height, width and step, and their
// number is step.
struct Lattice {
  double x1, y1, x2, y2;  // base box
  double offset;          // of the first anchor, in units of the stride
  int64_t stride, height, width;
  int64_t start, step;
  int64_t group, first_member;
};

GS_HOST_DEVICE int64_t num_cells(const Lattice& lattice) { return lattice.height * lattice.width; }
GS_HOST_DEVICE int64_t anchor_of_cell(const Lattice& lattice, int64_t cell) {
  return lattice.start + lattice.step * cell;
}
GS_HOST_DEVICE int64_t member_of_cell(const Lattice& lattice, int64_t cell) { return lattice.first_member + cell; }

// Where an anchor sits; `level` and `lattice` are indices into the array of lattices, `level` that of a level's first.
struct AnchorPlace {
  int64_t level, lattice, cell;
};

// Place of the anchor at a flat index. The search starts at `level`: 0, or the level of a lower flat index.
GS_HOST_DEVICE AnchorPlace locate_anchor(const Lattice* lattices, int64_t anchor, int64_t level = 0) {
  while (anchor - lattices[level].start >= lattices[level].step * num_cells(lattices[level])) {
    level += lattices[level].step;
  }
  const int64_t in_level = anchor - lattices[level].start, step = lattices[level].step;
  return {level, level + in_level % step, in_level / step};
}

// Lattice and cell of a group's member. Members are numbered lattice by lattice, so it is in the last lattice of the
// group that starts at or before it (those without cells start where the next one does).
GS_HOST_DEVICE void locate_member(const Lattice* lattices, int64_t count, int64_t group, int64_t member,
                                  int64_t* lattice, int64_t* cell) {
  int64_t i = count - 1;
  while (lattices[i].group != group || lattices[i].first_member > member) --i;
  *lattice = i;
  *cell = member - lattices[i].first_member;
}

// Shift of row or column `index`, rounded to T before it is added to the base box: the frameworks' order of rounding.
template <typename T>
GS_HOST_DEVICE T lattice_shift(const Lattice& lattice, int64_t index) {
  const double stride = static_cast<double>(lattice.stride);
  return static_cast<T>(lattice.offset * stride + stride * static_cast<double>(index));
}

template <typename T>
GS_HOST_DEVICE Box<T> lattice_box(const Lattice& lattice, int64_t row, int64_t col) {
  const T dx = lattice_shift<T>(lattice, col), dy = lattice_shift<T>(lattice, row);
  return {static_cast<T>(lattice.x1) + dx, static_cast<T>(lattice.y1) + dy, static_cast<T>(lattice.x2) + dx,
          static_cast<T>(lattice.y2) + dy};
}

// Rows and columns, both ends included. Empty when row1 < row0.
struct Window {
  int64_t row0, row1, col0, col1;
};

GS_HOST_DEVICE Window empty_window() { return {0, -1, 0, -1}; }

// Cells along one axis whose anchors' centers are within `reach` of `center`; first > last when there are none.
GS_HOST_DEVICE void clip_to_cells(double center, double reach, double base_center, double stride, double offset,
                                  int64_t size, int64_t* first, int64_t* last) {
  const double low = (center - reach - base_center) / stride - offset;
  const double high = (center + reach - base_center) / stride - offset;
  const double end = static_cast<double>(size - 1);
  if (!(low <= end && high >= 0.0)) {  // also when a coordinate is so large that the arithmetic gave NaN
    *first = 0;
    *last = -1;
    return;
  }
  // ceil and floor by truncation, after clipping to a range that an integer holds.
  const double clipped_low = low > 0.0 ? low : 0.0, clipped_high = high < end ? high : end;
  *first = static_cast<int64_t>(clipped_low);
  if (static_cast<double>(*first) < clipped_low) ++*first;
  *last = static_cast<int64_t>(clipped_high);
}

// A superset of the cells whose anchor intersects `face` (valid) by at least share_of_anchor * (anchor's area) +
// share_of_face * (face's area).
//
// With anchor a x b and face w x h, the intersection is at most ox * oy, ox <= min(a, w), oy <= min(b, h) and
// oy <= (b + h) / 2 - |distance of the centers in y|. So it needs oy >= T / min(a, w), which bounds the rows; the same
// in x bounds the columns. Two allowances keep the bound safe against the rounding of the T arithmetic that decides:
// a relative 1e-5 on T, and `slack` pixels on every anchor coordinate.
template <typename T>
GS_HOST_DEVICE Window window_of(const Lattice& lattice, const Box<T>& face, double share_of_anchor,
                                double share_of_face) {
  const double width = static_cast<double>(face.x2) - static_cast<double>(face.x1);
  const double height = static_cast<double>(face.y2) - static_cast<double>(face.y1);
  const double anchor_width = lattice.x2 - lattice.x1, anchor_height = lattice.y2 - lattice.y1;
  const double stride = static_cast<double>(lattice.stride);

  // Largest anchor coordinate times a few units in the last place of T.
  const double size = static_cast<double>(lattice.height > lattice.width ? lattice.height : lattice.width);
  const double low = lattice.x1 < lattice.y1 ? lattice.x1 : lattice.y1;
  const double high = lattice.x2 > lattice.y2 ? lattice.x2 : lattice.y2;
  const double extent = (high > 0.0 ? high : -high) + (low > 0.0 ? low : -low) + stride * (size + 1.0);
  const double slack = extent * (sizeof(T) == 4 ? 4.8e-7 : 8.9e-16);

  const double smallest =
      (anchor_width > slack ? anchor_width - slack : 0.0) * (anchor_height > slack ? anchor_height - slack : 0.0);
  const double needed = (share_of_anchor * smallest + share_of_face * width * height) * (1.0 - 1e-5);
  const double max_x = anchor_width + slack < width ? anchor_width + slack : width;
  const double max_y = anchor_height + slack < height ? anchor_height + slack : height;
  if (!(max_x * max_y >= needed)) return empty_window();

  const double center_x = 0.5 * static_cast<double>(face.x1) + 0.5 * static_cast<double>(face.x2);
  const double center_y = 0.5 * static_cast<double>(face.y1) + 0.5 * static_cast<double>(face.y2);
  Window window;
  clip_to_cells(center_y, 0.5 * (anchor_height + height) + slack - needed / max_x, 0.5 * (lattice.y1 + lattice.y2),
                stride, lattice.offset, lattice.height, &window.row0, &window.row1);
  clip_to_cells(center_x, 0.5 * (anchor_width + width) + slack - needed / max_y, 0.5 * (lattice.x1 + lattice.x2),
                stride, lattice.offset, lattice.width, &window.col0, &window.col1);
  return window.row0 <= window.row1 && window.col0 <= window.col1 ? window : empty_window();
}

// Window of the anchors whose IoU with `face` reaches `min_iou`: intersection >= iou / (1 + iou) * (sum of the areas).
template <typename T>
GS_HOST_DEVICE Window iou_window(const Lattice& lattice, const Box<T>& face, T min_iou) {
  const double share = static_cast<double>(min_iou) / (1.0 + static_cast<double>(min_iou));
  return is_valid(face) ? window_of(lattice, face, share, share) : empty_window();
}

// Window of the anchors of which `region` covers at least `min_share`.
template <typename T>
GS_HOST_DEVICE Window cover_window(const Lattice& lattice, const Box<T>& region, T min_share) {
  return is_valid(region) ? window_of(lattice, region, static_cast<double>(min_share), 0.0) : empty_window();
}

}  // namespace group_sampling
