// The extension module longattn._C: parameter structs to fill, and calls that release the interpreter lock.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/attention.h"
#include "cpu/isa.h"
#include "cpu/large_pages.h"
#include "cpu/peak.h"
#include "errors.h"
#include "longattn/mask.h"
#include "longattn/params.h"

namespace py = pybind11;
using longattn::AngleParams;
using longattn::Angles;
using longattn::AttentionParams;
using longattn::Bias;
using longattn::DType;
using longattn::Pages;
using longattn::RopeParams;
using longattn::Tensor4;

namespace {

using Address = std::uintptr_t;

template <class Params>
using Class = py::class_<Params>;

// Tensors are tuples (address, batch stride, head stride, token stride).
template <class Params>
void def_tensor(Class<Params>& cls, const char* name, Tensor4 Params::* field) {
  cls.def_property(
      name,
      [field](const Params& p) {
        const Tensor4& x = p.*field;
        return py::make_tuple(reinterpret_cast<Address>(x.data), x.batch, x.head, x.token);
      },
      [field](Params& p, const std::tuple<Address, int64_t, int64_t, int64_t>& x) {
        p.*field = Tensor4{reinterpret_cast<char*>(std::get<0>(x)), std::get<1>(x), std::get<2>(x), std::get<3>(x)};
      });
}

// Angles are tuples (address of cos, address of sin, batch stride).
template <class Params>
void def_angles(Class<Params>& cls, const char* name, Angles Params::* field) {
  cls.def_property(
      name,
      [field](const Params& p) {
        const Angles& x = p.*field;
        return py::make_tuple(reinterpret_cast<Address>(x.cos), reinterpret_cast<Address>(x.sin), x.batch);
      },
      [field](Params& p, const std::tuple<Address, Address, int64_t>& x) {
        p.*field = Angles{reinterpret_cast<const char*>(std::get<0>(x)), reinterpret_cast<const char*>(std::get<1>(x)),
                          std::get<2>(x)};
      });
}

// Biases are tuples (address, batch stride, head stride, query stride, key stride, dtype).
void def_bias(Class<AttentionParams>& cls, const char* name, Bias AttentionParams::* field) {
  cls.def_property(
      name,
      [field](const AttentionParams& p) {
        const Bias& x = p.*field;
        return py::make_tuple(reinterpret_cast<Address>(x.data), x.batch, x.head, x.query, x.key,
                              static_cast<int32_t>(x.dtype));
      },
      [field](AttentionParams& p, const std::tuple<Address, int64_t, int64_t, int64_t, int64_t, int32_t>& x) {
        p.*field = Bias{
            reinterpret_cast<char*>(std::get<0>(x)), std::get<1>(x), std::get<2>(x), std::get<3>(x), std::get<4>(x),
            static_cast<DType>(std::get<5>(x))};
      });
}

template <class Params, class T>
void def_address(Class<Params>& cls, const char* name, T* Params::* field) {
  cls.def_property(
      name, [field](const Params& p) { return reinterpret_cast<Address>(p.*field); },
      [field](Params& p, Address address) { p.*field = reinterpret_cast<T*>(address); });
}

// The float32 scales of a tensor of int8.
void def_scales(Class<AttentionParams>& cls, const char* name, Tensor4 AttentionParams::* field) {
  cls.def_property(
      name, [field](const AttentionParams& p) { return reinterpret_cast<Address>((p.*field).scales); },
      [field](AttentionParams& p, Address address) { (p.*field).scales = reinterpret_cast<float*>(address); });
}

// Pages are tuples (address of the table, its width, pages, slots of a page, sinks, ring, dtype).
void def_pages(Class<AttentionParams>& cls, const char* name, Pages AttentionParams::* field) {
  using Tuple = std::tuple<Address, int64_t, int64_t, int64_t, int64_t, int64_t, int32_t>;
  cls.def_property(
      name,
      [field](const AttentionParams& p) {
        const Pages& x = p.*field;
        return Tuple{reinterpret_cast<Address>(x.table), x.width, x.count, x.slots, x.sinks, x.ring,
                     static_cast<int32_t>(x.dtype)};
      },
      [field](AttentionParams& p, const Tuple& x) {
        p.*field = Pages{reinterpret_cast<const int32_t*>(std::get<0>(x)),
                         std::get<1>(x),
                         std::get<2>(x),
                         std::get<3>(x),
                         std::get<4>(x),
                         std::get<5>(x),
                         static_cast<DType>(std::get<6>(x))};
      });
}

template <class Params>
void def_dtype(Class<Params>& cls) {
  cls.def_property(
      "dtype", [](const Params& p) { return static_cast<int32_t>(p.dtype); },
      [](Params& p, int32_t dtype) { p.dtype = static_cast<DType>(dtype); });
}

void raise_invalid_input(const longattn::InvalidInput& error) {
  const py::object type = py::module_::import("longattn.errors").attr("InvalidInput");
  PyErr_SetObject(type.ptr(), type(error.argument, error.expected, error.got).ptr());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const longattn::InvalidInput& invalid) {
      raise_invalid_input(invalid);
    }
  });

  Class<AttentionParams> attention(m, "AttentionParams");
  attention.def(py::init<>())
      .def_readwrite("batch", &AttentionParams::batch)
      .def_readwrite("q_heads", &AttentionParams::q_heads)
      .def_readwrite("kv_heads", &AttentionParams::kv_heads)
      .def_readwrite("nq", &AttentionParams::nq)
      .def_readwrite("nk", &AttentionParams::nk)
      .def_readwrite("head_dim", &AttentionParams::head_dim)
      .def_readwrite("v_head_dim", &AttentionParams::v_head_dim)
      .def_readwrite("left", &AttentionParams::left)
      .def_readwrite("right", &AttentionParams::right)
      .def_readwrite("sinks", &AttentionParams::sinks)
      .def_readwrite("offset", &AttentionParams::offset)
      .def_readwrite("from_end", &AttentionParams::from_end)
      .def_readwrite("bounds_batch", &AttentionParams::bounds_batch)
      .def_readwrite("scale", &AttentionParams::scale)
      .def_readwrite("softcap", &AttentionParams::softcap)
      .def_readwrite("slopes_batch", &AttentionParams::slopes_batch)
      .def_readwrite("dropout_p", &AttentionParams::dropout_p)
      .def_readwrite("seed", &AttentionParams::seed)
      .def_readwrite("first_sequence", &AttentionParams::first_sequence)
      .def_readwrite("first_head", &AttentionParams::first_head)
      .def_readwrite("first_query", &AttentionParams::first_query)
      .def_readwrite("first_key", &AttentionParams::first_key)
      .def_readwrite("rotated", &AttentionParams::rotated)
      .def_readwrite("interleaved", &AttentionParams::interleaved)
      .def_readwrite("inv_freq_batch", &AttentionParams::inv_freq_batch)
      .def_readwrite("positions_batch", &AttentionParams::positions_batch)
      .def_readwrite("rope_factor", &AttentionParams::rope_factor)
      .def_readwrite("frame", &AttentionParams::frame)
      .def_readwrite("tree_batch", &AttentionParams::tree_batch)
      .def_readwrite("depths_batch", &AttentionParams::depths_batch)
      .def_readwrite("threads", &AttentionParams::threads);
  def_dtype(attention);
  def_tensor(attention, "new_k", &AttentionParams::new_k);
  def_tensor(attention, "new_v", &AttentionParams::new_v);
  def_scales(attention, "k_scales", &AttentionParams::k);
  def_scales(attention, "v_scales", &AttentionParams::v);
  def_pages(attention, "pages", &AttentionParams::pages);
  def_tensor(attention, "q", &AttentionParams::q);
  def_tensor(attention, "k", &AttentionParams::k);
  def_tensor(attention, "v", &AttentionParams::v);
  def_tensor(attention, "out", &AttentionParams::out);
  def_tensor(attention, "dout", &AttentionParams::dout);
  def_tensor(attention, "dq", &AttentionParams::dq);
  def_tensor(attention, "dk", &AttentionParams::dk);
  def_tensor(attention, "dv", &AttentionParams::dv);
  def_tensor(attention, "dq_sum", &AttentionParams::dq_sum);
  def_angles(attention, "q_angles", &AttentionParams::q_angles);
  def_angles(attention, "k_angles", &AttentionParams::k_angles);
  def_address(attention, "lse", &AttentionParams::lse);
  def_address(attention, "dlse", &AttentionParams::dlse);
  def_address(attention, "delta", &AttentionParams::delta);
  def_address(attention, "dslope_rows", &AttentionParams::dslope_rows);
  def_address(attention, "alibi_slopes", &AttentionParams::alibi_slopes);
  def_address(attention, "sink_logits", &AttentionParams::sink_logits);
  def_bias(attention, "bias", &AttentionParams::bias);
  def_bias(attention, "dbias", &AttentionParams::dbias);
  def_address(attention, "offsets", &AttentionParams::offsets);
  def_address(attention, "key_mask", &AttentionParams::key_mask);
  def_address(attention, "key_lens", &AttentionParams::key_lens);
  def_address(attention, "lo", &AttentionParams::lo);
  def_address(attention, "hi", &AttentionParams::hi);
  def_address(attention, "cu_seqlens_q", &AttentionParams::cu_seqlens_q);
  def_address(attention, "cu_seqlens_k", &AttentionParams::cu_seqlens_k);
  def_address(attention, "query_lens", &AttentionParams::query_lens);
  def_address(attention, "inv_freq", &AttentionParams::inv_freq);
  def_address(attention, "positions", &AttentionParams::positions);
  def_address(attention, "tree", &AttentionParams::tree);
  def_address(attention, "depths", &AttentionParams::depths);

  Class<AngleParams> angles(m, "AngleParams");
  angles.def(py::init<>())
      .def_readwrite("tokens", &AngleParams::tokens)
      .def_readwrite("half", &AngleParams::half)
      .def_readwrite("factor", &AngleParams::factor)
      .def_readwrite("threads", &AngleParams::threads);
  def_dtype(angles);
  def_address(angles, "positions", &AngleParams::positions);
  def_address(angles, "inv_freq", &AngleParams::inv_freq);
  def_address(angles, "cos", &AngleParams::cos);
  def_address(angles, "sin", &AngleParams::sin);

  Class<RopeParams> rope(m, "RopeParams");
  rope.def(py::init<>())
      .def_readwrite("batch", &RopeParams::batch)
      .def_readwrite("heads", &RopeParams::heads)
      .def_readwrite("tokens", &RopeParams::tokens)
      .def_readwrite("width", &RopeParams::width)
      .def_readwrite("rotated", &RopeParams::rotated)
      .def_readwrite("interleaved", &RopeParams::interleaved)
      .def_readwrite("inverse", &RopeParams::inverse)
      .def_readwrite("threads", &RopeParams::threads);
  def_dtype(rope);
  def_tensor(rope, "x", &RopeParams::x);
  def_tensor(rope, "out", &RopeParams::out);
  rope.def_readwrite("factor", &RopeParams::factor).def_readwrite("positions_batch", &RopeParams::positions_batch);
  def_address(rope, "positions", &RopeParams::positions);
  def_address(rope, "inv_freq", &RopeParams::inv_freq);

  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("attention_forward", &longattn::attention_forward, release);
  m.def("attention_backward", &longattn::attention_backward, release);
  m.def("attention_append", &longattn::attention_append, release);
  m.def("attention_decode", &longattn::attention_decode, release);
  m.def("angles", &longattn::angles, release);
  m.def("rope", &longattn::rope, release);

  m.def(
      "prefer_large_pages",
      [](Address data, int64_t bytes) { longattn::prefer_large_pages(reinterpret_cast<char*>(data), bytes); }, release);

  m.def("isa", &longattn::isa, "The instruction set in use.");
  m.def("isas", &longattn::usable_isas, "The instruction sets that were built and run here, fastest first.");

  m.def(
      "peak_gflops",
      [](int32_t dtype, int64_t threads, const std::string& isa) {
        return longattn::peak_gflops(static_cast<DType>(dtype), threads, isa);
      },
      release, py::arg("dtype"), py::arg("threads"), py::arg("isa") = "",
      "Measured peak of an instruction set's products in float32 (0), float64 (1) or bfloat16 (2); 0 without an "
      "instruction of their own.");

  // For the cross-test with longattn/mask.py; -1: unbounded.
  m.def("mask_allows", [](int64_t left, int64_t right, int64_t sinks, int64_t position, int64_t key) {
    return longattn::allows({left, right, sinks}, position, key);
  });
  m.def("mask_kv_range", [](int64_t left, int64_t right, int64_t sinks, int64_t first, int64_t last, int64_t lk) {
    const longattn::KeyRange range = longattn::kv_range({left, right, sinks}, first, last, lk);
    return py::make_tuple(range.sinks, range.start, range.full_start, range.full_stop, range.stop);
  });
}
