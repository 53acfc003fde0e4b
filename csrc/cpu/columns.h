// Boxes by coordinate, so that a loop over them fills whole vectors.
#pragma once

#include <cstdint>
#include <vector>

#include "../box_geometry.h"

namespace group_sampling {

template <typename T>
struct Columns {
  std::vector<T> x1, y1, x2, y2, area;

  Columns(const Box<T>* boxes, int64_t count) : x1(count), y1(count), x2(count), y2(count), area(count) {
    for (int64_t j = 0; j < count; ++j) {
      x1[j] = boxes[j].x1, y1[j] = boxes[j].y1, x2[j] = boxes[j].x2, y2[j] = boxes[j].y2;
      area[j] = box_area(boxes[j]);
    }
  }
};

}  // namespace group_sampling
