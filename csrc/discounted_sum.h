// Discounted sum of the rewards so far, by which rewards are scaled; the formula is in kernels/reward_scaling.py.
#pragma once

#include <cstddef>

namespace dppo_fast {

// reward, first and sum are row-major [T, N]; carry [N] is the sum before the first step.
template <typename Real>
void discounted_sum(std::size_t steps, std::size_t envs, const Real* reward, const bool* first, const double* carry,
                    double gamma, double* sum);

}  // namespace dppo_fast
