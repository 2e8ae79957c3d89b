#include "gae.h"

#include <vector>

namespace dppo_fast {

template <typename Real>
void gae(const Rollout<Real>& rollout, double gamma, double lambda, Real* advantage, Real* returns) {
  const double decay = gamma * lambda;
  std::vector<double> carry(rollout.envs, 0.0);
  const Real* following = rollout.last_value;
  for (std::size_t t = rollout.steps; t-- > 0;) {
    const std::size_t row = t * rollout.envs;
    for (std::size_t n = 0; n < rollout.envs; ++n) {
      const std::size_t i = row + n;
      const double value = rollout.value[i];
      const double beyond = rollout.truncated[i] ? rollout.bootstrap[i] : following[n];
      const double delta = rollout.reward[i] + gamma * (rollout.terminated[i] ? 0.0 : beyond) - value;
      const bool ended = rollout.terminated[i] || rollout.truncated[i];
      carry[n] = ended ? delta : delta + decay * carry[n];
      advantage[i] = static_cast<Real>(carry[n]);
      returns[i] = static_cast<Real>(carry[n] + value);
    }
    following = rollout.value + row;
  }
}

template void gae(const Rollout<float>&, double, double, float*, float*);
template void gae(const Rollout<double>&, double, double, double*, double*);

}  // namespace dppo_fast
