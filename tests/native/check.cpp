// A check of the C++ core without Python: random calls, forward, backward and on caches, against formulas.h. It is for
// what Python is not at hand for: an emulated machine, or a sanitizer's own runtime.
//
//   check                          every instruction set that was built and runs here, each in a process of its own
//   LONGATTN_CPU_ISA=avx2 check    one of them
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "cache.h"
#include "calls.h"
#include "cpu/attention.h"
#include "cpu/isa.h"
#include "errors.h"
#include "formulas.h"
#include "tensor.h"

namespace longattn::test {
namespace {

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};

// Counts what held, in groups of a line each, and says what did not.
class Report {
 public:
  void begin(const char* group) {
    group_ = group;
    before_ = counts_;
    worst_ = 0;
  }
  void expect(bool condition, const std::string& what) {
    ++(condition ? counts_.passed : counts_.failed);
    if (!condition) std::printf("  FAILED %s: %s\n", group_, what.c_str());
  }
  void compare(const std::string& what, const Tensor& got, const Exact& exact) {
    int64_t outside = 0;
    double worst = 0, worst_got = 0, worst_exact = 0;  // as a share of the budget
    got.each([&](int64_t b, int64_t h, int64_t i, int64_t c) {
      const double x = got.get(b, h, i, c);
      const Sum& sum = exact.sums[exact.shape.at(b, h, i, c)];
      if (x == sum.value || (std::isnan(x) && std::isnan(sum.value))) return;
      double share = std::fabs(x - sum.value) / (sum.terms + exact.least);
      if (std::isnan(share)) share = kInfinity;
      outside += share > 1;
      if (share <= worst) return;
      worst = share;
      worst_got = x;
      worst_exact = sum.value;
    });
    worst_ = std::max(worst_, worst);
    char detail[200];
    std::snprintf(detail, sizeof(detail),
                  ": %lld entries outside their budget, the worst %.3g times: %.9g, expected %.9g",
                  static_cast<long long>(outside), worst, worst_got, worst_exact);
    expect(outside == 0, what + detail);
  }
  void end() const {
    std::printf("%-12s %-27s%4d passed, %d failed; largest error %.2f of its budget\n", isa().c_str(), group_,
                counts_.passed - before_.passed, counts_.failed - before_.failed, worst_);
    std::fflush(stdout);
  }
  bool finish() const {
    std::printf("%-12s %d passed, %d failed\n", isa().c_str(), counts_.passed, counts_.failed);
    std::fflush(stdout);
    return counts_.failed == 0;
  }

 private:
  struct Counts {
    int passed = 0, failed = 0;
  };
  const char* group_ = "";
  Counts counts_, before_;
  double worst_ = 0;
};

struct Outputs {
  Tensor out, lse, delta, dq, dq_sum, dk, dv, dbias, dslope_rows;
};

// Forward and backward into fresh memory.
Outputs run(const Call& call, int64_t threads) {
  AttentionParams p = call.p;
  p.threads = threads;
  const DType wide = accumulation_type(p.dtype);
  const Shape of_queries{call.memory_rows(), p.q_heads, p.nq, 1};
  Outputs o;
  o.out = Tensor(p.dtype, call.dout.shape, Tensor::kTokensFirst);
  o.lse = o.delta = o.dslope_rows = Tensor(wide, of_queries);
  o.dq = Tensor(p.dtype, call.q.shape, Tensor::kGaps);
  o.dk = Tensor(p.dtype, call.k.shape, Tensor::kTokensFirst);
  o.dv = Tensor(p.dtype, call.v.shape, Tensor::kGaps);
  p.out = o.out.view();
  p.lse = o.lse.data();
  attention_forward(p);

  p.dq = o.dq.view();
  p.dk = o.dk.view();
  p.dv = o.dv.view();
  p.delta = o.delta.data();
  Tensor& dq_sum = p.dtype == wide ? o.dq : o.dq_sum;
  if (p.dtype != wide) dq_sum = Tensor(wide, call.q.shape, Tensor::kTokensFirst);
  dq_sum.zero();
  p.dq_sum = dq_sum.view();
  if (p.bias.data && p.bias.dtype != DType::kBool) {
    o.dbias = Tensor(wide, call.bias.shape);
    o.dbias.zero();
    p.dbias = o.dbias.bias();
  }
  if (p.alibi_slopes) {
    o.dslope_rows.zero();
    p.dslope_rows = o.dslope_rows.data();
  }
  attention_backward(p);
  return o;
}

// A call, and its results by the formulas: the same for all instruction sets.
struct Expectation {
  const char* name;
  std::unique_ptr<Call> call;
  Results exact;
};

std::vector<Expectation> expectations() {
  std::vector<Expectation> all;
  for (const Case& c : cases())
    for (DType dtype : kDTypes) {
      auto call = std::make_unique<Call>(c, dtype);
      Results exact = Formulas(*call).results();
      all.push_back({c.name, std::move(call), std::move(exact)});
    }
  return all;
}

void check_attention(const Expectation& expected, Report* report) {
  const AttentionParams& p = expected.call->p;
  const Results& exact = expected.exact;
  const Outputs got = run(*expected.call, 1), again = run(*expected.call, 3);
  const auto check = [&](const char* name, Tensor Outputs::* tensor, const Exact& values) {
    const std::string what = std::string(dtype_name(p.dtype)) + " " + name;
    report->compare(what, got.*tensor, values);
    report->expect((got.*tensor).only_entries_are_touched(), what + " writes between its rows");
    report->expect(got.*tensor == again.*tensor, what + " depends on the number of threads");
  };
  check("out", &Outputs::out, exact.out);
  check("lse", &Outputs::lse, exact.lse);
  check("delta", &Outputs::delta, exact.delta);
  check("dq", &Outputs::dq, exact.dq);
  check("dk", &Outputs::dk, exact.dk);
  check("dv", &Outputs::dv, exact.dv);
  if (p.bias.data && p.bias.dtype != DType::kBool) check("dbias", &Outputs::dbias, exact.dbias);
  if (p.alibi_slopes) check("dslope_rows", &Outputs::dslope_rows, exact.dslope_rows);
}

struct CacheExpectation {
  const char* name;
  std::unique_ptr<CachedCall> cached;
  Results exact;
};

std::vector<CacheExpectation> cache_expectations() {
  std::vector<CacheExpectation> all;
  for (const CacheCase& c : cache_cases())
    for (DType dtype : kDTypes) {
      auto cached = std::make_unique<CachedCall>(c, dtype);
      Results exact = Formulas(cached->call).results();
      all.push_back({c.call.name, std::move(cached), std::move(exact)});
    }
  return all;
}

void check_cache(const CacheExpectation& expected, Report* report) {
  const AttentionParams& p = expected.cached->call.p;
  const auto decoded = [&](int64_t threads) {
    Outputs o;
    o.out = Tensor(p.dtype, {p.batch, p.q_heads, p.nq, p.v_head_dim}, Tensor::kTokensFirst);
    o.lse = Tensor(accumulation_type(p.dtype), {p.batch, p.q_heads, p.nq, 1});
    expected.cached->run(threads, &o.out, &o.lse);
    return o;
  };
  const Outputs got = decoded(1), again = decoded(3);
  const std::string name = dtype_name(p.dtype);
  report->compare(name + " out", got.out, expected.exact.out);
  report->compare(name + " lse", got.lse, expected.exact.lse);
  report->expect(got.out.only_entries_are_touched(), name + " out writes between its rows");
  report->expect(got.out == again.out && got.lse == again.lse, name + " depends on the number of threads");
}

// Positions that turn a little, a lot, and so much that no polynomial holds.
struct Stands {
  static constexpr double kFactor = 1.25;
  std::vector<float> positions, inv_freq;

  Stands(int64_t tokens, int64_t half) {
    Random random(5);
    for (int64_t i = 0; i < tokens; ++i)
      positions.push_back(static_cast<float>(i % 7 ? i : random.between(-1, 1) * std::pow(10.0, i % 12)));
    for (int64_t c = 0; c < half; ++c) inv_freq.push_back(static_cast<float>(std::pow(0.01, c / double(half))));
  }

  double angle(int64_t token, int64_t c) const { return positions[token] * inv_freq[c]; }

  void fill(Tensor* cos, Tensor* sin) const {
    AngleParams p;
    p.tokens = static_cast<int64_t>(positions.size());
    p.half = static_cast<int64_t>(inv_freq.size());
    p.dtype = cos->dtype;
    p.positions = positions.data();
    p.inv_freq = inv_freq.data();
    p.factor = kFactor;
    p.cos = cos->data();
    p.sin = sin->data();
    p.threads = 2;
    angles(p);
  }
};

void check_angles(DType dtype, Report* report) {
  const int64_t tokens = 300, half = 21;
  const Stands stands(tokens, half);
  Tensor cos(dtype, {1, 1, tokens, half}), sin = cos;
  stands.fill(&cos, &sin);
  double worst = 0;
  for (int64_t i = 0; i < tokens; ++i)
    for (int64_t c = 0; c < half; ++c) {
      const double angle = stands.angle(i, c);
      worst = std::max({worst, std::abs(cos.get(0, 0, i, c) - std::cos(angle) * Stands::kFactor),
                        std::abs(sin.get(0, 0, i, c) - std::sin(angle) * Stands::kFactor)});
    }
  const double unit = dtype == DType::kFloat64 ? 0x1p-53 : 0x1p-24;
  report->expect(worst <= 1.2 * unit,
                 std::string(dtype_name(dtype)) + " cos or sin is off by " + std::to_string(worst / unit) + " units");
}

void check_rope(DType dtype, bool interleaved, bool inverse, Report* report) {
  Random random(7);
  const Shape shape{2, 3, 300, 12};
  Tensor x(dtype, shape, Tensor::kTokensFirst), cos(accumulation_type(dtype), {1, 1, 300, 4}), sin = cos;
  x.fill([&] { return random.between(-1, 1); });
  const Stands stands(300, 4);
  stands.fill(&cos, &sin);
  RopeParams p;
  p.batch = shape.batch;
  p.heads = shape.head;
  p.tokens = shape.token;
  p.width = shape.width;
  p.rotated = 8;
  p.dtype = dtype;
  p.interleaved = interleaved;
  p.inverse = inverse;
  p.x = x.view();
  p.positions = stands.positions.data();
  p.inv_freq = stands.inv_freq.data();
  p.factor = Stands::kFactor;
  const auto turned = [&](int64_t threads) {
    Tensor out(dtype, shape, Tensor::kGaps);
    p.out = out.view();
    p.threads = threads;
    rope(p);
    return out;
  };
  const Tensor got = turned(1);

  const Units units(dtype);
  Exact exact(shape, 0, units.least);
  for (int64_t b = 0; b < shape.batch; ++b)
    for (int64_t h = 0; h < shape.head; ++h)
      for (int64_t i = 0; i < shape.token; ++i) {
        std::vector<Sum> row = row_of(x, b, h, i);
        turn(row.data(), p.rotated, interleaved, cos, sin, 0, i, inverse);
        for (Sum& sum : row) sum.terms *= units.storage;
        std::copy(row.begin(), row.end(), exact.row(b, h, i));
      }
  report->compare(dtype_name(dtype), got, exact);
  report->expect(got.only_entries_are_touched(), std::string(dtype_name(dtype)) + " writes between its rows");
  report->expect(got == turned(3), std::string(dtype_name(dtype)) + " depends on the number of threads");
}

// Turns tokens of pairs x by angles whose sines are 0, or by none if cos is nullptr: a tile's work, by a table of ours.
Tensor turned(Tensor* x, Tensor* cos) {
  Tensor out(x->dtype, x->shape), sin;
  RopeParams p;
  p.batch = p.heads = 1;
  p.dtype = x->dtype;
  p.tokens = x->shape.token;
  p.width = x->shape.width;
  Angles tables;
  if (cos) {
    sin = *cos;
    sin.zero();
    p.rotated = 2;
    tables = {cos->data(), sin.data(), 0};
  }
  p.x = x->view();
  p.out = out.view();
  std::vector<char> scratch(kernels().rope_scratch(p));
  kernels().rope(p, tables, 0, 0, 0, p.tokens, scratch.data());
  return out;
}

// Between 16 bits and float32. Rope that turns nothing converts there and back; numbers of float32 come as cosines of
// rotations of 1.
void check_conversions(DType dtype, Report* report) {
  const int fraction = fraction_bits(dtype);
  Tensor all(dtype, {1, 1, 65536, 1});
  for (int n = 0; n < 65536; ++n) write_as(all.data() + 2 * n, static_cast<uint16_t>(n));
  Tensor back = turned(&all, nullptr);
  int wrong = 0;
  for (int n = 0; n < 65536; ++n) {
    const bool same = read_as<uint16_t>(back.data() + 2 * n) == n;
    wrong += std::isnan(all.get(0, 0, n, 0)) ? !std::isnan(back.get(0, 0, n, 0)) : !same;
  }
  report->expect(wrong == 0, std::string(dtype_name(dtype)) + " to float32 and back");

  Random random(11);
  Tensor cos(DType::kFloat32, {1, 1, 20000, 1}), ones(dtype, {1, 1, 20000, 2});
  for (int64_t n = 0; n < 20000; ++n) {
    uint32_t bits = static_cast<uint32_t>(random.integer(0, UINT32_MAX));
    if (n % 2) {  // halfway between two neighbours, or the float32 next to that
      const uint16_t low = static_cast<uint16_t>(bits), high = static_cast<uint16_t>(bits + 1);
      write_as(cos.data() + 4 * n,
               static_cast<float>(from_16_bits(low, fraction) / 2 + from_16_bits(high, fraction) / 2));
      bits = read_as<uint32_t>(cos.data() + 4 * n) + static_cast<uint32_t>(random.integer(-1, 1));
    }
    write_as(cos.data() + 4 * n, bits);
    ones.set(0, 0, n, 0, 1);
    ones.set(0, 0, n, 1, 0);
  }
  const Tensor narrow = turned(&ones, &cos);
  wrong = 0;
  for (int64_t n = 0; n < 20000; ++n) {
    const double got = narrow.get(0, 0, n, 0);
    const double expected = from_16_bits(to_16_bits(cos.get(0, 0, n, 0), fraction), fraction);
    wrong += std::isnan(expected) ? !std::isnan(got) : got != expected;
  }
  report->expect(wrong == 0, std::string("float32 to ") + dtype_name(dtype));
}

void check_bad_input(Report* report) {
  const auto refuses = [&](const char* argument, const std::function<void()>& call) {
    std::string found = "nothing";
    try {
      call();
    } catch (const InvalidInput& error) {
      found = error.argument;
    }
    report->expect(found == argument, std::string("refused ") + found + ", expected " + argument);
  };
  const Call call(Case("plain"), DType::kFloat32);
  const auto forward = [&](const char* argument, void (*spoil)(AttentionParams*)) {
    Tensor out(DType::kFloat32, {2, 2, 70, 14}), lse(DType::kFloat32, {2, 2, 70, 1});
    AttentionParams p = call.p;
    p.out = out.view();
    p.lse = lse.data();
    spoil(&p);
    refuses(argument, [&] { attention_forward(p); });
  };
  forward("head_dim", [](AttentionParams* p) { p->head_dim = 513; });
  forward("q_heads", [](AttentionParams* p) { p->kv_heads = 3; });
  forward("q", [](AttentionParams* p) { p->q.data = nullptr; });
  forward("k", [](AttentionParams* p) { p->k.token = INT64_MAX; });
  forward("threads", [](AttentionParams* p) { p->threads = 0; });
  forward("dtype", [](AttentionParams* p) { p->dtype = DType::kBool; });
  refuses("out", [&] { attention_backward(call.p); });
  refuses("width", [] { rope({}); });
}

int check(const std::vector<Expectation>& expected, const std::vector<CacheExpectation>& of_caches) {
  Report report;
  for (size_t n = 0; n < expected.size(); ++n) {
    if (n % std::size(kDTypes) == 0) report.begin(expected[n].name);
    check_attention(expected[n], &report);
    if ((n + 1) % std::size(kDTypes) == 0) report.end();
  }
  for (size_t n = 0; n < of_caches.size(); ++n) {
    if (n % std::size(kDTypes) == 0) report.begin(of_caches[n].name);
    check_cache(of_caches[n], &report);
    if ((n + 1) % std::size(kDTypes) == 0) report.end();
  }
  report.begin("angles");
  for (DType dtype : {DType::kFloat32, DType::kFloat64}) check_angles(dtype, &report);
  report.end();
  report.begin("rope alone");
  for (DType dtype : kDTypes)
    for (bool interleaved : {false, true})
      for (bool inverse : {false, true}) check_rope(dtype, interleaved, inverse, &report);
  report.end();
  report.begin("conversions");
  for (DType dtype : {DType::kBFloat16, DType::kFloat16}) check_conversions(dtype, &report);
  report.end();
  report.begin("bad input");
  check_bad_input(&report);
  report.end();
  return report.finish() ? EXIT_SUCCESS : EXIT_FAILURE;
}

// A process keeps the instruction set that it took first, so each gets its own.
int check_every_instruction_set(const std::vector<Expectation>& expected,
                                const std::vector<CacheExpectation>& of_caches) {
  std::vector<pid_t> children;
  for (const std::string& name : usable_isas()) {
    children.push_back(fork());
    if (children.back() == 0) {
      setenv("LONGATTN_CPU_ISA", name.c_str(), 1);
      std::exit(check(expected, of_caches));
    }
  }
  bool good = true;
  for (size_t n = 0; n < children.size(); ++n) {
    int status = -1;
    waitpid(children[n], &status, 0);
    if (!WIFEXITED(status)) std::printf("%-12s ended by signal %d\n", usable_isas()[n].c_str(), WTERMSIG(status));
    good = good && WIFEXITED(status) && WEXITSTATUS(status) == EXIT_SUCCESS;
  }
  return good ? EXIT_SUCCESS : EXIT_FAILURE;
}

}  // namespace
}  // namespace longattn::test

int main() {
  using namespace longattn::test;
  const auto expected = expectations();
  const auto of_caches = cache_expectations();
  const char* isa = std::getenv("LONGATTN_CPU_ISA");
  return isa && *isa ? check(expected, of_caches) : check_every_instruction_set(expected, of_caches);
}
