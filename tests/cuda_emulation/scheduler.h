// What the operators' side needs of the emulated device.
#pragma once

#include <cstdint>
#include <string>

#include "memory.h"

namespace emulation {

Memory& memory();

// Between begin_call and end_call, memory() and launches belong to one call of an operator.
void begin_call();
void end_call();

void set_seed(uint64_t seed);

// Whether kernels are now and then given fewer blocks than they ask for, as they are where a launch's limit is reached.
void set_cut_grids(bool cut);

// What each kernel did since the last reset_counts, as JSON.
std::string counts();
void reset_counts();

}  // namespace emulation
