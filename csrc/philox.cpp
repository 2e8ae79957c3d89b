#include "philox.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace dppo_fast {
namespace {

using Words = std::array<std::uint32_t, 4>;

// Philox4x32-10 (Salmon et al. 2011).
Words philox(Words counter, std::uint32_t key0, std::uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xd2511f53} * counter[0];
    const std::uint64_t b = std::uint64_t{0xcd9e8d57} * counter[2];
    counter = {static_cast<std::uint32_t>(b >> 32) ^ counter[1] ^ key0, static_cast<std::uint32_t>(b),
               static_cast<std::uint32_t>(a >> 32) ^ counter[3] ^ key1, static_cast<std::uint32_t>(a)};
    key0 += 0x9e3779b9;
    key1 += 0xbb67ae85;
  }
  return counter;
}

double uniform(std::uint32_t word) { return ((word >> 9) + 0.5) * 0x1p-23; }

}  // namespace

void keyed_normal(std::uint64_t seed, std::size_t batch, const std::int64_t* env, const std::int64_t* step,
                  std::size_t draws, std::size_t size, float* out) {
  constexpr double kTwoPi = 6.283185307179586;
  for (std::size_t draw = 0; draw < draws; ++draw) {
    for (std::size_t b = 0; b < batch; ++b, out += size) {
      for (std::size_t dim = 0; dim < size; dim += 4) {
        const Words words = philox({static_cast<std::uint32_t>(dim / 4), static_cast<std::uint32_t>(draw),
                                    static_cast<std::uint32_t>(step[b]), static_cast<std::uint32_t>(env[b])},
                                   static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32));
        float normals[4];
        for (int i = 0; i < 4; i += 2) {
          const double radius = std::sqrt(-2 * std::log(uniform(words[i])));
          const double angle = kTwoPi * uniform(words[i + 1]);
          normals[i] = static_cast<float>(radius * std::cos(angle));
          normals[i + 1] = static_cast<float>(radius * std::sin(angle));
        }
        std::copy_n(normals, std::min<std::size_t>(4, size - dim), out + dim);
      }
    }
  }
}

}  // namespace dppo_fast
