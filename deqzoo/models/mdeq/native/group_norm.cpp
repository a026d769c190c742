// Group normalisation of channels-last tensors on the CPU, with an optional rectifier before or
// after it, forward and backward. One pass gathers the moments of a sample, one writes the result,
// both over whole rows of channels, so that few channels per group vectorise as well as many.

#include <torch/extension.h>

#include <ATen/Parallel.h>

#include <cmath>
#include <vector>

namespace {

using std::vector;

inline float load(const float* p, int64_t i) { return p[i]; }
inline float load(const at::BFloat16* p, int64_t i) {
  // The shift vectorises where the class's own conversion does not.
  uint32_t bits = static_cast<uint32_t>(p[i].x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline void store(float* p, int64_t i, float v) { p[i] = v; }
inline void store(at::BFloat16* p, int64_t i, float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof(bits));
  // Round to nearest even; a NaN must stay one.
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  p[i].x = static_cast<uint16_t>(v != v ? 0x7fc0u : rounded);
}

inline float relu(float v) { return v > 0 ? v : (v != v ? v : 0.f); }

// Rows of the picture that are handled side by side, so that inner loops are long enough.
int64_t lanes(int64_t pixels, int64_t channels) {
  int64_t k = 1;
  while (k * channels < 128 && pixels % (2 * k) == 0) k *= 2;
  return k;
}

// Repeat the first `channels` entries k times.
void tile(vector<float>& v, int64_t channels, int64_t k) {
  for (int64_t j = 1; j < k; ++j)
    for (int64_t c = 0; c < channels; ++c) v[j * channels + c] = v[c];
}

// Add the k copies of `channels` entries into the first.
void fold(vector<float>& v, int64_t channels, int64_t k) {
  for (int64_t j = 1; j < k; ++j)
    for (int64_t c = 0; c < channels; ++c) v[c] += v[j * channels + c];
}

struct Shape {
  int64_t batch, pixels, channels, groups;
};

template <class T, bool before, bool after>
void forward_kernel(const T* x, T* y, const float* weight, const float* bias, float* mean,
                    float* rstd, Shape s, float eps) {
  const int64_t k = lanes(s.pixels, s.channels), width = k * s.channels, rows = s.pixels / k;
  const int64_t size = s.channels / s.groups;
  at::parallel_for(0, s.batch, 1, [&](int64_t begin, int64_t end) {
    vector<float> sum(width), square(width), scale(width), shift(width);
    for (int64_t n = begin; n < end; ++n) {
      const T* in = x + n * s.pixels * s.channels;
      T* out = y + n * s.pixels * s.channels;
      std::fill(sum.begin(), sum.end(), 0.f);
      std::fill(square.begin(), square.end(), 0.f);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < width; ++i) {
          float v = load(in, r * width + i);
          if (before) v = relu(v);
          sum[i] += v;
          square[i] += v * v;
        }
      fold(sum, s.channels, k);
      fold(square, s.channels, k);
      for (int64_t g = 0; g < s.groups; ++g) {
        double m = 0, q = 0;
        for (int64_t c = g * size; c < (g + 1) * size; ++c) m += sum[c], q += square[c];
        m /= double(size * s.pixels);
        double variance = q / double(size * s.pixels) - m * m;
        float inverse = 1.f / std::sqrt(float(variance < 0 ? 0 : variance) + eps);
        mean[n * s.groups + g] = float(m);
        rstd[n * s.groups + g] = inverse;
        for (int64_t c = g * size; c < (g + 1) * size; ++c) {
          scale[c] = inverse * weight[c];
          shift[c] = bias[c] - float(m) * scale[c];
        }
      }
      tile(scale, s.channels, k);
      tile(shift, s.channels, k);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < width; ++i) {
          float v = load(in, r * width + i);
          if (before) v = relu(v);
          v = v * scale[i] + shift[i];
          store(out, r * width + i, after ? relu(v) : v);
        }
    }
  });
}

template <class T, bool before, bool after>
void backward_kernel(const T* x, const T* dy, T* dx, const float* weight, const float* bias,
                     const float* mean, const float* rstd, float* dweight, float* dbias, Shape s) {
  const int64_t k = lanes(s.pixels, s.channels), width = k * s.channels, rows = s.pixels / k;
  const int64_t size = s.channels / s.groups;
  at::parallel_for(0, s.batch, 1, [&](int64_t begin, int64_t end) {
    vector<float> product(width), total(width), scale(width), shift(width), slope(width),
        constant(width);
    for (int64_t n = begin; n < end; ++n) {
      const T* in = x + n * s.pixels * s.channels;
      const T* cotangent = dy + n * s.pixels * s.channels;
      T* out = dx + n * s.pixels * s.channels;
      for (int64_t c = 0; c < s.channels; ++c) {
        const int64_t g = n * s.groups + c / size;
        scale[c] = rstd[g] * weight[c];
        shift[c] = bias[c] - mean[g] * scale[c];
      }
      tile(scale, s.channels, k);
      tile(shift, s.channels, k);
      std::fill(product.begin(), product.end(), 0.f);
      std::fill(total.begin(), total.end(), 0.f);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < width; ++i) {
          float v = load(in, r * width + i), d = load(cotangent, r * width + i);
          if (before) v = relu(v);
          if (after) d = v * scale[i] + shift[i] > 0 ? d : 0.f;
          product[i] += d * v;
          total[i] += d;
        }
      fold(product, s.channels, k);
      fold(total, s.channels, k);
      for (int64_t g = 0; g < s.groups; ++g) {
        const float m = mean[n * s.groups + g], inverse = rstd[n * s.groups + g];
        float a = 0, b = 0;
        for (int64_t c = g * size; c < (g + 1) * size; ++c) {
          a += product[c] * weight[c];
          b += total[c] * weight[c];
          dweight[n * s.channels + c] = (product[c] - m * total[c]) * inverse;
          dbias[n * s.channels + c] = total[c];
        }
        const float count = 1.f / float(size * s.pixels);
        const float linear = (b * m - a) * inverse * inverse * inverse * count;
        for (int64_t c = g * size; c < (g + 1) * size; ++c) {
          slope[c] = linear;
          constant[c] = -linear * m - b * inverse * count;
        }
      }
      tile(slope, s.channels, k);
      tile(constant, s.channels, k);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < width; ++i) {
          const float raw = load(in, r * width + i);
          float v = before ? relu(raw) : raw, d = load(cotangent, r * width + i);
          if (after) d = v * scale[i] + shift[i] > 0 ? d : 0.f;
          float gradient = scale[i] * d + slope[i] * v + constant[i];
          if (before) gradient = raw > 0 ? gradient : 0.f;
          store(out, r * width + i, gradient);
        }
    }
  });
}

#define DISPATCH(kernel, T, ...)                                      \
  do {                                                                \
    if (before && after) kernel<T, true, true>(__VA_ARGS__);          \
    else if (before) kernel<T, true, false>(__VA_ARGS__);             \
    else if (after) kernel<T, false, true>(__VA_ARGS__);              \
    else kernel<T, false, false>(__VA_ARGS__);                        \
  } while (0)

Shape shape_of(const torch::Tensor& x, int64_t groups) {
  return {x.size(0), x.size(2) * x.size(3), x.size(1), groups};
}

template <class T>
T* data(const torch::Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

}  // namespace

vector<torch::Tensor> group_norm_forward(torch::Tensor x, torch::Tensor weight, torch::Tensor bias,
                                         int64_t groups, double eps, bool before, bool after) {
  x = x.contiguous(at::MemoryFormat::ChannelsLast);
  auto y = torch::empty_like(x);
  auto mean = torch::empty({x.size(0), groups}, weight.options()), rstd = torch::empty_like(mean);
  Shape s = shape_of(x, groups);
  auto *w = data<float>(weight), *b = data<float>(bias), *m = data<float>(mean),
       *r = data<float>(rstd);
  if (x.scalar_type() == at::kBFloat16)
    DISPATCH(forward_kernel, at::BFloat16, data<at::BFloat16>(x), data<at::BFloat16>(y), w, b, m, r,
             s, float(eps));
  else
    DISPATCH(forward_kernel, float, data<float>(x), data<float>(y), w, b, m, r, s, float(eps));
  return {y, mean, rstd};
}

vector<torch::Tensor> group_norm_backward(torch::Tensor dy, torch::Tensor x, torch::Tensor weight,
                                          torch::Tensor bias, torch::Tensor mean,
                                          torch::Tensor rstd, int64_t groups, bool before,
                                          bool after) {
  x = x.contiguous(at::MemoryFormat::ChannelsLast);
  dy = dy.contiguous(at::MemoryFormat::ChannelsLast);
  auto dx = torch::empty_like(x);
  auto dweight = torch::empty({x.size(0), x.size(1)}, weight.options()),
       dbias = torch::empty_like(dweight);
  Shape s = shape_of(x, groups);
  auto *w = data<float>(weight), *b = data<float>(bias), *m = data<float>(mean),
       *r = data<float>(rstd), *dw = data<float>(dweight), *db = data<float>(dbias);
  if (x.scalar_type() == at::kBFloat16)
    DISPATCH(backward_kernel, at::BFloat16, data<at::BFloat16>(x), data<at::BFloat16>(dy),
             data<at::BFloat16>(dx), w, b, m, r, dw, db, s);
  else
    DISPATCH(backward_kernel, float, data<float>(x), data<float>(dy), data<float>(dx), w, b, m, r,
             dw, db, s);
  return {dx, dweight, dbias};
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("forward", &group_norm_forward);
  m.def("backward", &group_norm_backward);
}
