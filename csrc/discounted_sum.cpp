#include "discounted_sum.h"

namespace dppo_fast {

template <typename Real>
void discounted_sum(std::size_t steps, std::size_t envs, const Real* reward, const bool* first, const double* carry,
                    double gamma, double* sum) {
  const double* before = carry;
  for (std::size_t t = 0; t < steps; ++t) {
    const std::size_t row = t * envs;
    for (std::size_t n = 0; n < envs; ++n) {
      const std::size_t i = row + n;
      sum[i] = first[i] ? reward[i] : reward[i] + gamma * before[n];
    }
    before = sum + row;
  }
}

template void discounted_sum(std::size_t, std::size_t, const float*, const bool*, const double*, double, double*);
template void discounted_sum(std::size_t, std::size_t, const double*, const bool*, const double*, double, double*);

}  // namespace dppo_fast
