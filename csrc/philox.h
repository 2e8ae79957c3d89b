// Standard normals keyed by what they are for; the formula is in kernels/philox.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dppo_fast {

// env and step are [batch]; writes out [draws, batch, size].
void keyed_normal(std::uint64_t seed, std::size_t batch, const std::int64_t* env, const std::int64_t* step,
                  std::size_t draws, std::size_t size, float* out);

}  // namespace dppo_fast
