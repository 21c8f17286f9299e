// Scalars, address spaces, vectors and their constructors, numeric limits.
#pragma once
#include "runtime/abi.h"
#define __METAL_VERSION__ 320
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
typedef unsigned long size_t;
typedef long ptrdiff_t;
typedef unsigned long uintptr_t;
typedef _Float16 half;
typedef __bf16 bfloat;

#ifdef MSL_TYPES
#define device __attribute__((address_space(1)))
#define constant const __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#else
#define device
#define constant const
#define threadgroup
#endif
#define thread
#define kernel
#define METAL_FUNC inline __attribute__((always_inline))
// The emulator's own memory is neither traced nor counted.
#define MSL_UNTRACED __attribute__((no_sanitize("thread")))
#define MSL_SITE(name) \
  msl_site { name, msl_file, msl_line, msl_column }
#define MSL_HERE \
  const char *msl_file = __builtin_FILE(), int msl_line = __builtin_LINE(), int msl_column = __builtin_COLUMN()

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define FLT_MAX __FLT_MAX__
#define FLT_MIN __FLT_MIN__
#define FLT_EPSILON __FLT_EPSILON__
#define HALF_MAX ((half)65504.0f)
#define INT_MAX __INT_MAX__
#define INT_MIN (-__INT_MAX__ - 1)
#define UINT_MAX 4294967295u
#define USHRT_MAX 65535
#define M_PI_F 3.14159274101257324219f
#define M_E_F 2.71828174591064453125f
#define M_LOG2E_F 1.44269502162933349609f
#define M_LN2_F 0.693147182464599609375f
constexpr half operator""h(long double x) { return (half)x; }
constexpr half operator""h(unsigned long long x) { return (half)x; }
constexpr bfloat operator""bf(long double x) { return (bfloat)x; }

namespace metal {
template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));
#ifdef MSL_TYPES
// Only the types count here, and clang copies no class out of another address space.
#define MSL_PACKED3(T) typedef T##3 packed_##T##3 __attribute__((aligned(sizeof(T))));
#else
#define MSL_PACKED3(T)                                \
  struct packed_##T##3 {                              \
    T x, y, z;                                        \
    packed_##T##3() = default;                        \
    packed_##T##3(T##3 v) : x(v.x), y(v.y), z(v.z) {} \
    operator T##3() const { return T##3{x, y, z}; }   \
  };
#endif
#define MSL_VECTORS(T)                                            \
  typedef vec<T, 2> T##2;                                         \
  typedef vec<T, 3> T##3;                                         \
  typedef vec<T, 4> T##4;                                         \
  typedef T##2 packed_##T##2 __attribute__((aligned(sizeof(T)))); \
  typedef T##4 packed_##T##4 __attribute__((aligned(sizeof(T)))); \
  MSL_PACKED3(T)
MSL_VECTORS(float) MSL_VECTORS(half) MSL_VECTORS(bfloat) MSL_VECTORS(char) MSL_VECTORS(uchar) MSL_VECTORS(short)
MSL_VECTORS(ushort) MSL_VECTORS(int) MSL_VECTORS(uint) MSL_VECTORS(long) MSL_VECTORS(ulong)
#undef MSL_VECTORS

template <class T, class U> struct is_same { static constexpr bool value = false; };
template <class T> struct is_same<T, T> { static constexpr bool value = true; };
template <class T, class U> constexpr bool is_same_v = is_same<T, U>::value;
template <bool B, class T, class U> struct conditional { typedef T type; };
template <class T, class U> struct conditional<false, T, U> { typedef U type; };
template <bool B, class T, class U> using conditional_t = typename conditional<B, T, U>::type;
template <bool B, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { typedef T type; };
template <bool B, class T = void> using enable_if_t = typename enable_if<B, T>::type;
template <class T>
constexpr bool is_floating_point_v = is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>;
template <class T> struct is_floating_point { static constexpr bool value = is_floating_point_v<T>; };

template <class T> struct msl_shape { typedef T element; static constexpr int count = 1; };
template <class T, int N> struct msl_shape<vec<T, N>> { typedef T element; static constexpr int count = N; };

// float4(x), float4(a, b, c, d), float4(half4), float4(float2, float2): all of Metal's vector constructors.
template <class V, class... A> METAL_FUNC V msl_make(A... parts) {
  constexpr int wanted = msl_shape<V>::count, given = (msl_shape<A>::count + ... + 0);
  typedef typename msl_shape<V>::element T;
  V v{};
  int at = 0;
  [[maybe_unused]] auto put = [&](auto x) {
    if constexpr (msl_shape<decltype(x)>::count == 1)
      v[at++] = (T)x;
    else
      for (int i = 0; i < msl_shape<decltype(x)>::count; i++) v[at++] = (T)x[i];
  };
  (put(parts), ...);
  if constexpr (sizeof...(A) == 1 && given == 1)
    for (; at < wanted; at++) v[at] = v[0];
  else
    static_assert(given == 0 || given == wanted, "wrong number of components in a vector constructor");
  return v;
}
template <class T, class U> METAL_FUNC T as_type(U u) {
  static_assert(sizeof(T) == sizeof(U), "as_type between types of different size");
  return __builtin_bit_cast(T, u);
}

template <class T> struct numeric_limits;
#define MSL_INTEGER_LIMITS(T, highest, smallest)       \
  template <> struct numeric_limits<T> {               \
    static constexpr T max() { return highest; }       \
    static constexpr T min() { return smallest; }      \
    static constexpr T lowest() { return smallest; }   \
  };
MSL_INTEGER_LIMITS(char, 127, -128) MSL_INTEGER_LIMITS(signed char, 127, -128) MSL_INTEGER_LIMITS(uchar, 255, 0)
MSL_INTEGER_LIMITS(short, 32767, -32768) MSL_INTEGER_LIMITS(ushort, 65535, 0)
MSL_INTEGER_LIMITS(int, INT_MAX, INT_MIN) MSL_INTEGER_LIMITS(uint, UINT_MAX, 0)
MSL_INTEGER_LIMITS(long, __LONG_MAX__, -__LONG_MAX__ - 1) MSL_INTEGER_LIMITS(ulong, ~0ul, 0)
#define MSL_FLOAT_LIMITS(T, highest, smallest, ulp)                         \
  template <> struct numeric_limits<T> {                                    \
    static constexpr T max() { return (T)highest; }                         \
    static constexpr T min() { return (T)smallest; }                        \
    static constexpr T lowest() { return (T)-highest; }                     \
    static constexpr T epsilon() { return (T)ulp; }                         \
    static constexpr T infinity() { return (T)__builtin_inff(); }           \
    static constexpr T quiet_NaN() { return (T)__builtin_nanf(""); }        \
  };
MSL_FLOAT_LIMITS(float, __FLT_MAX__, __FLT_MIN__, __FLT_EPSILON__)
MSL_FLOAT_LIMITS(half, 65504.0f, 6.103515625e-05f, 9.765625e-04f)
MSL_FLOAT_LIMITS(bfloat, 3.38953139e38f, 1.17549435e-38f, 7.8125e-3f)
}  // namespace metal

// Constructor calls become msl_make; a bare type name is untouched, since these macros take arguments.
#define float2(...) msl_make<::metal::float2>(__VA_ARGS__)
#define float3(...) msl_make<::metal::float3>(__VA_ARGS__)
#define float4(...) msl_make<::metal::float4>(__VA_ARGS__)
#define half2(...) msl_make<::metal::half2>(__VA_ARGS__)
#define half3(...) msl_make<::metal::half3>(__VA_ARGS__)
#define half4(...) msl_make<::metal::half4>(__VA_ARGS__)
#define bfloat2(...) msl_make<::metal::bfloat2>(__VA_ARGS__)
#define bfloat3(...) msl_make<::metal::bfloat3>(__VA_ARGS__)
#define bfloat4(...) msl_make<::metal::bfloat4>(__VA_ARGS__)
#define int2(...) msl_make<::metal::int2>(__VA_ARGS__)
#define int3(...) msl_make<::metal::int3>(__VA_ARGS__)
#define int4(...) msl_make<::metal::int4>(__VA_ARGS__)
#define uint2(...) msl_make<::metal::uint2>(__VA_ARGS__)
#define uint3(...) msl_make<::metal::uint3>(__VA_ARGS__)
#define uint4(...) msl_make<::metal::uint4>(__VA_ARGS__)
#define char4(...) msl_make<::metal::char4>(__VA_ARGS__)
#define uchar4(...) msl_make<::metal::uchar4>(__VA_ARGS__)
#define short4(...) msl_make<::metal::short4>(__VA_ARGS__)
#define ushort4(...) msl_make<::metal::ushort4>(__VA_ARGS__)
#define long2(...) msl_make<::metal::long2>(__VA_ARGS__)
#define ulong2(...) msl_make<::metal::ulong2>(__VA_ARGS__)
