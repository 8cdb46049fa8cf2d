// The product of a mask and an element as torch rounds it, for host and device.
#pragma once

#include "lp_norm.h"

namespace lnprune {

// In float for what is narrower: a pruned -0.0 stays -0.0 and a pruned infinity becomes NaN.
template <class T>
LNPRUNE_FUNCTION T masked_product(T mask, T x) {
  return static_cast<T>(static_cast<float>(mask) * static_cast<float>(x));
}
LNPRUNE_FUNCTION float masked_product(float mask, float x) { return mask * x; }
LNPRUNE_FUNCTION double masked_product(double mask, double x) { return mask * x; }

}  // namespace lnprune
