// What MLX puts before every custom kernel (its utils.h), as far as kernels use it; restated here for a CPU.
#pragma once
#include <metal_stdlib>
typedef half float16_t;
typedef bfloat bfloat16_t;

template <class T> struct Limits {
  static constexpr T max = numeric_limits<T>::max(), min = numeric_limits<T>::lowest();
  static constexpr T finite_max = numeric_limits<T>::max(), finite_min = numeric_limits<T>::lowest();
};
#define MSL_MLX_LIMITS(T)                                                                              \
  template <> struct Limits<T> {                                                                       \
    static constexpr T max = numeric_limits<T>::infinity(), min = (T)-numeric_limits<T>::infinity();   \
    static constexpr T finite_max = numeric_limits<T>::max(), finite_min = numeric_limits<T>::lowest(); \
  };
MSL_MLX_LIMITS(float) MSL_MLX_LIMITS(half) MSL_MLX_LIMITS(bfloat)
#define MLX_MTL_PRAGMA_UNROLL _Pragma("clang loop unroll(full)")
#define MLX_MTL_LOOP_UNROLL MLX_MTL_PRAGMA_UNROLL

template <class Index = int64_t>
METAL_FUNC Index elem_to_loc(Index elem, constant int* shape, constant int64_t* strides, int ndim) {
  Index location = 0;
  for (int i = ndim - 1; i >= 0 && elem > 0; --i) {
    location += (elem % shape[i]) * Index(strides[i]);
    elem /= shape[i];
  }
  return location;
}
template <class T, class U> inline T ceildiv(T n, U m) { return (n + m - 1) / m; }
inline float log1p(float x) {
  float y = 1.0f + x;
  return y == INFINITY ? y : y == 1.0f ? x : x * (metal::log(y) / (y - 1.0f));
}

// For the generated entry point: an attribute of three components.
template <class V> MSL_UNTRACED inline V msl_triple_as(const msl_triple& t) {
  V v;
  v.x = t.x, v.y = t.y;
  if constexpr (msl_shape<V>::count == 3) v.z = t.z;
  return v;
}
