// The parts of a training step for which torch has no single operation, each in one pass over memory (float32, CPU).
//
// Once the encoder product is made, a step is bound by memory. These loops read an atom once for reconstruction, error
// and gradient of the values, and a parameter once for gradient, projection and Adam's update; a gradient [N, d] is
// never written.

#include <ATen/Parallel.h>
#include <torch/library.h>
#include <torch/types.h>

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <vector>

namespace {

using at::Tensor;

constexpr int64_t kLanes = 16;
constexpr int64_t kAtoms = 4;           // atoms that are read at a time
constexpr int64_t kAhead = 2 * kAtoms;  // and how many later the ones that are fetched meanwhile are
constexpr int64_t kAdamBlock = 64;

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

inline Vector load(const float* p) { return *reinterpret_cast<const Vector*>(p); }
inline void store(float* p, Vector v) { *reinterpret_cast<Vector*>(p) = v; }

inline float sum_of_lanes(Vector v) {
  float total = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) total += v[lane];
  return total;
}

inline Vector root(Vector v) {
  Vector out;
  for (int64_t lane = 0; lane < kLanes; ++lane) out[lane] = std::sqrt(v[lane]);
  return out;
}
inline float root(float v) { return std::sqrt(v); }

// ---- Reconstructions -----------------------------------------------------------------------------------------------

// Rows and the atoms they chose. Atoms are read whole, several at a time, the next ones on their way meanwhile.
struct ChosenAtoms {
  const float* atoms;      // [N, width]
  const int64_t* indices;  // [entries]
  int64_t entries, width;

  const float* operator[](int64_t entry) const { return atoms + indices[entry] * width; }

  template <int Atoms>
  void prefetch(int64_t entry, int64_t column) const {
    for (int g = 0; g < Atoms; ++g)
      if (entry + kAhead + g < entries) __builtin_prefetch((*this)[entry + kAhead + g] + column);
  }

  // sums[p] [width] += the atoms of these entries, weighted by values[p * stride].
  template <int Codes, int Atoms>
  void add(int64_t entry, const float* values, int64_t stride, float* sums, int64_t distance) const {
    const float* atom[Atoms];
    for (int g = 0; g < Atoms; ++g) atom[g] = (*this)[entry + g];
    int64_t column = 0;
    for (; column + kLanes <= width; column += kLanes) {
      prefetch<Atoms>(entry, column);
      Vector part[Atoms];
      for (int g = 0; g < Atoms; ++g) part[g] = load(atom[g] + column);
      for (int p = 0; p < Codes; ++p) {
        Vector sum = load(sums + p * distance + column);
        for (int g = 0; g < Atoms; ++g) sum += part[g] * values[p * stride + g];
        store(sums + p * distance + column, sum);
      }
    }
    for (; column < width; ++column)
      for (int p = 0; p < Codes; ++p)
        for (int g = 0; g < Atoms; ++g) sums[p * distance + column] += atom[g][column] * values[p * stride + g];
  }

  // products[p * stride] = the products of rows[p] [width] with the atoms of these entries.
  template <int Codes, int Atoms, bool Far>
  void multiply(int64_t entry, const float* rows, int64_t distance, float* products, int64_t stride) const {
    const float* atom[Atoms];
    for (int g = 0; g < Atoms; ++g) atom[g] = (*this)[entry + g];
    Vector sums[Codes][Atoms] = {};
    int64_t column = 0;
    for (; column + kLanes <= width; column += kLanes) {
      if (Far) prefetch<Atoms>(entry, column);
      Vector row[Codes];
      for (int p = 0; p < Codes; ++p) row[p] = load(rows + p * distance + column);
      for (int g = 0; g < Atoms; ++g) {
        const Vector part = load(atom[g] + column);
        for (int p = 0; p < Codes; ++p) sums[p][g] += part * row[p];
      }
    }
    for (int p = 0; p < Codes; ++p) {
      for (int g = 0; g < Atoms; ++g) {
        float product = sum_of_lanes(sums[p][g]);
        for (int64_t c = column; c < width; ++c) product += rows[p * distance + c] * atom[g][c];
        products[p * stride + g] = product;
      }
    }
  }
};

struct Residuals {
  ChosenAtoms chosen;
  const float *values, *targets;     // [codes, batch, k], [batch, width]
  float *residuals, *errors, *dots;  // [codes, batch, width], [codes, batch], [codes, batch, k]
  int64_t batch, k;

  // Decode, subtract, square, and multiply by every atom again, now in the cache.
  template <int Codes>
  void row(int64_t row) const {
    const int64_t width = chosen.width, first = row * k, distance = batch * width, stride = batch * k;
    float* residual = residuals + row * width;
    for (int p = 0; p < Codes; ++p)
      for (int64_t c = 0; c < width; ++c) residual[p * distance + c] = -targets[row * width + c];
    int64_t j = 0;
    for (; j + kAtoms <= k; j += kAtoms)
      chosen.add<Codes, kAtoms>(first + j, values + first + j, stride, residual, distance);
    for (; j < k; ++j) chosen.add<Codes, 1>(first + j, values + first + j, stride, residual, distance);
    for (int p = 0; p < Codes; ++p) {
      float squares = 0;
      for (int64_t c = 0; c < width; ++c) squares += residual[p * distance + c] * residual[p * distance + c];
      errors[p * batch + row] = squares;
    }
    for (j = 0; j + kAtoms <= k; j += kAtoms)
      chosen.multiply<Codes, kAtoms, false>(first + j, residual, distance, dots + first + j, stride);
    for (; j < k; ++j) chosen.multiply<Codes, 1, false>(first + j, residual, distance, dots + first + j, stride);
  }

  template <int Codes>
  void run() const {
    at::parallel_for(0, batch, 1, [&](int64_t first, int64_t last) {
      for (int64_t at = first; at < last; ++at) row<Codes>(at);
    });
  }
};

// values [P, batch, k], atoms [N, d], indices [batch, k], targets [batch, d] -> residuals [P, batch, d], their squares'
// sums [P, batch], and their products with the chosen atoms [P, batch, k].
std::tuple<Tensor, Tensor, Tensor> residuals(
    const Tensor& values, const Tensor& atoms, const Tensor& indices, const Tensor& targets) {
  const int64_t codes = values.size(0), batch = values.size(1), k = values.size(2), width = atoms.size(1);
  Tensor out = at::empty({codes, batch, width}, values.options());
  Tensor errors = at::empty({codes, batch}, values.options());
  Tensor dots = at::empty({codes, batch, k}, values.options());
  const ChosenAtoms chosen{atoms.const_data_ptr<float>(), indices.const_data_ptr<int64_t>(), batch * k, width};
  for (int64_t first = 0; first < codes; first += 3) {
    const Residuals work{
        chosen, values.const_data_ptr<float>() + first * batch * k, targets.const_data_ptr<float>(),
        out.mutable_data_ptr<float>() + first * batch * width, errors.mutable_data_ptr<float>() + first * batch,
        dots.mutable_data_ptr<float>() + first * batch * k, batch, k};
    switch (codes - first) {
      case 1: work.run<1>(); break;
      case 2: work.run<2>(); break;
      default: work.run<3>(); break;
    }
  }
  return {out, errors, dots};
}

// rows [batch, d], atoms [N, d], indices [batch, k] -> their products [batch, k].
Tensor dots(const Tensor& rows, const Tensor& atoms, const Tensor& indices) {
  const int64_t batch = indices.size(0), k = indices.size(1), width = atoms.size(1);
  Tensor out = at::empty({batch, k}, rows.options());
  const ChosenAtoms chosen{atoms.const_data_ptr<float>(), indices.const_data_ptr<int64_t>(), batch * k, width};
  const float* from = rows.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, batch, 1, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      int64_t j = row * k;
      for (; j + kAtoms <= (row + 1) * k; j += kAtoms)
        chosen.multiply<1, kAtoms, true>(j, from + row * width, 0, to + j, 0);
      for (; j < (row + 1) * k; ++j) chosen.multiply<1, 1, true>(j, from + row * width, 0, to + j, 0);
    }
  });
  return out;
}

// ---- Selection -----------------------------------------------------------------------------------------------------

// Integers in the order of the floats, NaN of either sign above everything, so that sorting stays defined whatever a row
// holds, and both zeros equal.
inline int32_t order_key(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const int32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fffffff;
  return magnitude == 0 ? 0 : bits ^ ((bits >> 31) & 0x7fffffff);
}

// The k largest latents of the sum of several [batch, N], largest first, the lower number first among equals.
Tensor top_k_of_sum(const std::vector<Tensor>& parts, int64_t k) {
  const int64_t batch = parts[0].size(0), latents = parts[0].size(1);
  Tensor indices = at::empty({batch, k}, parts[0].options().dtype(at::kLong));
  std::vector<const float*> data;
  for (const Tensor& part : parts) data.push_back(part.const_data_ptr<float>());
  int64_t* out = indices.mutable_data_ptr<int64_t>();
  // The k-th largest of the maxima of at least k groups is at most the k-th largest of all.
  const int64_t groups = std::min(latents, std::max<int64_t>(2 * k, 128));
  at::parallel_for(0, batch, 1, [&](int64_t first, int64_t last) {
    std::vector<float> sums(latents);
    std::vector<int32_t> keys(latents), maxima(groups), kept(latents);
    for (int64_t row = first; row < last; ++row) {
      std::copy_n(data[0] + row * latents, latents, sums.data());
      for (size_t p = 1; p < data.size(); ++p) {
        const float* part = data[p] + row * latents;
        for (int64_t i = 0; i < latents; ++i) sums[i] += part[i];
      }
      for (int64_t i = 0; i < latents; ++i) keys[i] = order_key(sums[i]);
      std::copy_n(keys.data(), groups, maxima.data());
      for (int64_t start = groups; start < latents; start += groups) {
        const int64_t count = std::min(groups, latents - start);
        for (int64_t g = 0; g < count; ++g) maxima[g] = std::max(maxima[g], keys[start + g]);
      }
      std::nth_element(maxima.begin(), maxima.begin() + (k - 1), maxima.end(), std::greater<int32_t>());
      const int32_t bound = maxima[k - 1];
      int64_t count = 0;
      for (int64_t i = 0; i < latents; ++i) {
        kept[count] = static_cast<int32_t>(i);
        count += keys[i] >= bound;
      }
      std::partial_sort(kept.begin(), kept.begin() + k, kept.begin() + count, [&](int32_t a, int32_t b) {
        return keys[a] > keys[b] || (keys[a] == keys[b] && a < b);
      });
      std::copy_n(kept.data(), k, out + row * k);
    }
  });
  return indices;
}

// indices [batch, k] -> entries sorted by latent, and where each latent's entries start [N + 1].
std::tuple<Tensor, Tensor> transpose(const Tensor& indices, int64_t latents) {
  const int64_t entries = indices.numel();
  Tensor order = at::empty({entries}, indices.options());
  Tensor offsets = at::zeros({latents + 1}, indices.options());
  const int64_t* latent = indices.const_data_ptr<int64_t>();
  int64_t *position = order.mutable_data_ptr<int64_t>(), *start = offsets.mutable_data_ptr<int64_t>();
  for (int64_t e = 0; e < entries; ++e) ++start[latent[e] + 1];
  for (int64_t i = 0; i < latents; ++i) start[i + 1] += start[i];
  std::vector<int64_t> next(start, start + latents);
  for (int64_t e = 0; e < entries; ++e) position[next[latent[e]]++] = e;
  return {order, offsets};
}

// ---- Adam ----------------------------------------------------------------------------------------------------------

// One term of a gradient: for each latent the sum of coefficient * row over the entries that chose it.
struct Term {
  const float* rows;  // [codes, batch, width]
  const int64_t* offsets;
  int64_t codes, batch;
  std::vector<int32_t> row_of_entry;  // both sorted by latent
  std::vector<float> coefficients;    // [entries, codes]
  std::vector<float> dots;            // [entries, codes], with unit norm only
  std::vector<float> packed;          // the rows' present columns, [batch, codes, columns]
};

struct AdamStep {
  float *parameter, *average, *square;
  int64_t latents, width;
  // What is taken of a gradient comes from double: 1 - 0.999 in float is 1.29e-5 too small, and runs drift with it.
  float keep1, keep2, take1, take2, step_size, root_correction, eps;
  std::vector<Term> terms;
  // Per latent, where rows are brought to unit norm: 1 / norm, and the gradient's part along the unit row.
  bool unit_norm;
  std::vector<float> scale, along;
  int64_t start = 0, columns = 0;  // the packed columns

  // What packed rows may take of a core's second-level cache: most of it.
  static int64_t table_floats() {
    const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return (bytes > 0 ? bytes : 1024 * 1024) / static_cast<int64_t>(sizeof(float)) * 4 / 5;
  }

  template <typename Number>
  inline void update(Number gradient, Number& p, Number& m, Number& v, int64_t latent) const {
    if (unit_norm) {
      p *= scale[latent];
      gradient -= along[latent] * p;
    }
    m = keep1 * m + take1 * gradient;
    v = keep2 * v + take2 * gradient * gradient;
    p -= step_size * m / (root(v) * root_correction + eps);
  }

  void block(int64_t latent, int64_t column) const {
    constexpr int64_t vectors = kAdamBlock / kLanes;
    if (latent + 1 < latents) {
      const int64_t next = (latent + 1) * width + column;
      for (int64_t v = 0; v < vectors; ++v) {
        __builtin_prefetch(parameter + next + v * kLanes, 1);
        __builtin_prefetch(average + next + v * kLanes, 1);
        __builtin_prefetch(square + next + v * kLanes, 1);
      }
    }
    Vector gradient[vectors] = {};
    for (const Term& term : terms) {
      for (int64_t position = term.offsets[latent]; position < term.offsets[latent + 1]; ++position) {
        const float* row = term.packed.data() + term.row_of_entry[position] * term.codes * columns + column - start;
        const float* coefficient = term.coefficients.data() + position * term.codes;
        for (int64_t p = 0; p < term.codes; ++p, row += columns)
          for (int64_t v = 0; v < vectors; ++v) gradient[v] += coefficient[p] * load(row + v * kLanes);
      }
    }
    for (int64_t part = 0; part < vectors; ++part) {
      const int64_t at = latent * width + column + part * kLanes;
      Vector p = load(parameter + at), m = load(average + at), v = load(square + at);
      update(gradient[part], p, m, v, latent);
      store(parameter + at, p);
      store(average + at, m);
      store(square + at, v);
    }
  }

  void tail(int64_t latent) const {
    for (int64_t column = start; column < start + columns; ++column) {
      float gradient = 0;
      for (const Term& term : terms)
        for (int64_t position = term.offsets[latent]; position < term.offsets[latent + 1]; ++position)
          for (int64_t p = 0; p < term.codes; ++p)
            gradient += term.coefficients[position * term.codes + p] *
                        term.packed[(term.row_of_entry[position] * term.codes + p) * columns + column - start];
      const int64_t at = latent * width + column;
      update(gradient, parameter[at], average[at], square[at], latent);
    }
  }

  // Column sums of the parameter, weighted per latent, are taken on the way, before the update.
  void run(const float* weights, float* column_sums) {
    int64_t rows = 1;
    for (const Term& term : terms) rows = std::max(rows, term.codes * term.batch);
    const int64_t blocks = width / kAdamBlock;
    const int64_t most = std::max<int64_t>(1, table_floats() / rows / kAdamBlock);  // blocks of a range of columns
    const int64_t ranges = (blocks + most - 1) / most;
    std::mutex adding;
    for (int64_t range = 0; range <= ranges; ++range) {
      // After the ranges of whole blocks come the columns that are left.
      start = range < ranges ? blocks * range / ranges * kAdamBlock : blocks * kAdamBlock;
      columns = (range < ranges ? blocks * (range + 1) / ranges * kAdamBlock : width) - start;
      if (columns == 0) continue;
      for (Term& term : terms) pack(term);
      at::parallel_for(0, latents, 16, [&](int64_t first, int64_t last) {
        std::vector<float> sums(weights ? columns : 0);
        for (int64_t latent = first; latent < last; ++latent) {
          // The row is in the cache when its update follows.
          if (unit_norm && start == 0) measure(latent);
          if (weights && weights[latent] != 0)
            for (int64_t c = 0; c < columns; ++c) sums[c] += weights[latent] * parameter[latent * width + start + c];
          if (range == ranges) {
            tail(latent);
          } else {
            for (int64_t column = start; column < start + columns; column += kAdamBlock) block(latent, column);
          }
        }
        if (weights) {
          const std::lock_guard<std::mutex> lock(adding);
          for (int64_t c = 0; c < columns; ++c) column_sums[start + c] += sums[c];
        }
      });
    }
  }

  // Bring the present columns of a term's rows together: few pages, and a row's codes beside each other.
  void pack(Term& term) const {
    term.packed.resize(term.codes * term.batch * columns);
    at::parallel_for(0, term.batch, 16, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row)
        for (int64_t p = 0; p < term.codes; ++p)
          std::copy_n(term.rows + (p * term.batch + row) * width + start, columns,
                      term.packed.data() + (row * term.codes + p) * columns);
    });
  }

  // The norm of a row, and its gradient's part along it from the products of the terms' rows with it.
  void measure(int64_t latent) {
    const float* row = parameter + latent * width;
    float squares = 0, product = 0;
    for (int64_t c = 0; c < width; ++c) squares += row[c] * row[c];
    for (const Term& term : terms)
      for (int64_t e = term.offsets[latent] * term.codes; e < term.offsets[latent + 1] * term.codes; ++e)
        product += term.coefficients[e] * term.dots[e];
    scale[latent] = 1 / (std::sqrt(squares) + 1e-8f);
    along[latent] = product * scale[latent];
  }
};

// values [codes, batch, k] -> [entries, codes], sorted by latent.
std::vector<float> by_latent(const Tensor& values, const int64_t* order) {
  const int64_t codes = values.size(0), entries = values.size(1) * values.size(2);
  const float* from = values.const_data_ptr<float>();
  std::vector<float> out(entries * codes);
  at::parallel_for(0, entries, 4096, [&](int64_t first, int64_t last) {
    for (int64_t position = first; position < last; ++position)
      for (int64_t p = 0; p < codes; ++p) out[position * codes + p] = from[p * entries + order[position]];
  });
  return out;
}

// One Adam update of a parameter [N, d] whose gradient is the sum of terms: coefficients [P, batch, k], rows
// [P, batch, d], order and offsets as `transpose` gives them. With dots [P, batch, k], the products of rows and chosen
// parameter rows, the parameter's rows are brought to unit norm first and the gradient loses its part along them.
// Returns [d], the sum of the former parameter's rows weighted by `weights` [N], or nothing where that is empty.
Tensor adam_step(
    const Tensor& parameter, const Tensor& average, const Tensor& square, const std::vector<Tensor>& coefficients,
    const std::vector<Tensor>& rows, const std::vector<Tensor>& orders, const std::vector<Tensor>& offsets,
    const std::vector<Tensor>& dots, const Tensor& weights, double beta1, double beta2, double step_size,
    double root_correction, double eps) {
  AdamStep work;
  work.parameter = parameter.mutable_data_ptr<float>();
  work.average = average.mutable_data_ptr<float>();
  work.square = square.mutable_data_ptr<float>();
  work.latents = parameter.size(0);
  work.width = parameter.size(1);
  work.keep1 = beta1, work.keep2 = beta2, work.take1 = 1 - beta1, work.take2 = 1 - beta2;
  work.step_size = step_size, work.eps = eps;
  work.root_correction = root_correction;
  work.unit_norm = !dots.empty();
  if (work.unit_norm) work.scale.resize(work.latents), work.along.resize(work.latents);
  for (size_t t = 0; t < rows.size(); ++t) {
    const int64_t* order = orders[t].const_data_ptr<int64_t>();
    const int64_t k = coefficients[t].size(2);
    Term term;
    term.rows = rows[t].const_data_ptr<float>();
    term.offsets = offsets[t].const_data_ptr<int64_t>();
    term.codes = coefficients[t].size(0), term.batch = coefficients[t].size(1);
    term.row_of_entry.resize(term.batch * k);
    for (int64_t e = 0; e < term.batch * k; ++e) term.row_of_entry[e] = static_cast<int32_t>(order[e] / k);
    term.coefficients = by_latent(coefficients[t], order);
    if (work.unit_norm) term.dots = by_latent(dots[t], order);
    work.terms.push_back(std::move(term));
  }
  const bool sums = weights.numel() > 0;
  Tensor column_sums = at::zeros({sums ? work.width : 0}, parameter.options());
  work.run(sums ? weights.const_data_ptr<float>() : nullptr, column_sums.mutable_data_ptr<float>());
  return column_sums;
}

}  // namespace

TORCH_LIBRARY(sparc_hf, library) {
  library.def("residuals(Tensor values, Tensor atoms, Tensor indices, Tensor targets) -> (Tensor, Tensor, Tensor)", &residuals);
  library.def("dots(Tensor rows, Tensor atoms, Tensor indices) -> Tensor", &dots);
  library.def("top_k_of_sum(Tensor[] parts, int k) -> Tensor", &top_k_of_sum);
  library.def("transpose(Tensor indices, int latents) -> (Tensor, Tensor)", &transpose);
  library.def(
      "adam_step(Tensor(a!) parameter, Tensor(b!) average, Tensor(c!) square, Tensor[] coefficients, Tensor[] rows, "
      "Tensor[] orders, Tensor[] offsets, Tensor[] dots, Tensor weights, float beta1, float beta2, float step_size, "
      "float root_correction, float eps) -> Tensor",
      &adam_step);
}
