// Generalised advantage estimation over a rollout of T steps in N environments
// (Schulman et al. 2016, arXiv 1506.02438, eq. 16); the formula is in kernels/gae.py.
#pragma once

#include <cstddef>

namespace dppo_fast {

// Row-major [T, N] each; last_value is [N].
template <typename Real>
struct Rollout {
  std::size_t steps;
  std::size_t envs;
  const Real* reward;
  const Real* value;
  const Real* bootstrap;
  const Real* last_value;
  const bool* terminated;
  const bool* truncated;
};

// Writes advantage and returns, [T, N] each. Accumulates in double whatever Real is.
template <typename Real>
void gae(const Rollout<Real>& rollout, double gamma, double lambda, Real* advantage, Real* returns);

}  // namespace dppo_fast
