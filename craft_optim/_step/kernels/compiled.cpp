// Inner products and merge of pairs of vectors in one pass each. Plain C functions, called through ctypes.
//
// Vectors come in pieces: a pointer into a task gradient, one into a retention gradient, either of which may be null
// (zero), and a length. A piece's result depends on nothing but its elements, so it is the same with any number of
// threads.

#include <cstdint>
#include <cstring>

namespace {

struct BFloat16 {
  uint16_t bits;
};

inline double load(double x) { return x; }
inline float load(float x) { return x; }
inline float load(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void store(double x, double* to) { *to = x; }
inline void store(float x, float* to) { *to = x; }
inline void store(float x, BFloat16* to) {  // to the nearest, ties to even; without a branch, so that it vectorises
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to->bits = nan ? 0x7fc0 : static_cast<uint16_t>(rounded);
}

template <class T, class R>
void dots(const T* t, const R* r, int64_t n, double* tt, double* rr, double* tr) {
  double of_t = 0, of_r = 0, of_both = 0;
  if (t && r) {
#pragma omp simd reduction(+ : of_t, of_r, of_both)
    for (int64_t i = 0; i < n; ++i) {
      const double x = load(t[i]), y = load(r[i]);
      of_t += x * x;
      of_r += y * y;
      of_both += x * y;
    }
  } else if (t) {
#pragma omp simd reduction(+ : of_t)
    for (int64_t i = 0; i < n; ++i) {
      const double x = load(t[i]);
      of_t += x * x;
    }
  } else {
#pragma omp simd reduction(+ : of_r)
    for (int64_t i = 0; i < n; ++i) {
      const double y = load(r[i]);
      of_r += y * y;
    }
  }
  *tt = of_t;
  *rr = of_r;
  *tr = of_both;
}

template <class T, class R>
void axpby(const T* t, R* r, int64_t n, double task, double retention) {
  using Wide = decltype(load(T{}) + load(R{}));
  using Result = decltype(load(R{}));
  const Wide a = static_cast<Wide>(task), w = static_cast<Wide>(retention);
  if (t) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) store(static_cast<Result>(a * load(t[i]) + w * load(r[i])), r + i);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) store(static_cast<Result>(w * load(r[i])), r + i);
  }
}

// Calls `f` with both pointers as what they point to. Kinds: 0 float32, 1 float64, 2 bfloat16.
template <class R, class F>
void with_types(int32_t kind_t, const void* t, R* r, F f) {
  switch (kind_t) {
    case 0: return f(static_cast<const float*>(t), r);
    case 1: return f(static_cast<const double*>(t), r);
    case 2: return f(static_cast<const BFloat16*>(t), r);
  }
}

template <class F>
void with_types(int32_t kind_t, int32_t kind_r, const void* t, void* r, F f) {
  switch (kind_r) {
    case 0: return with_types(kind_t, t, static_cast<float*>(r), f);
    case 1: return with_types(kind_t, t, static_cast<double*>(r), f);
    case 2: return with_types(kind_t, t, static_cast<BFloat16*>(r), f);
  }
}

}  // namespace

extern "C" {

void craft_dots(int64_t pieces, const void* const* t, void* const* r, const int64_t* length, const int32_t* kind_t,
                const int32_t* kind_r, double* tt, double* rr, double* tr) {
  for (int64_t i = 0; i < pieces; ++i)
    with_types(kind_t[i], kind_r[i], t[i], r[i],
               [&](auto x, auto y) { dots(x, y, length[i], tt + i, rr + i, tr + i); });
}

void craft_merge(int64_t pieces, const void* const* t, void* const* r, const int64_t* length, const int32_t* kind_t,
                 const int32_t* kind_r, const double* task, const double* retention) {
  for (int64_t i = 0; i < pieces; ++i)
    with_types(kind_t[i], kind_r[i], t[i], r[i],
               [&](auto x, auto y) { axpby(x, y, length[i], task[i], retention[i]); });
}
}
