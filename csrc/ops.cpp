// The native ops: schemas, checks, dtype dispatch, CPU registration, and the pybind11 module.
//
// Every op takes lists; one tensor is a list of one. None is differentiable and none returns an
// alias.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/version.h>

#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace lnprune {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

ElementType element_type(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return ElementType::float64;
    case ScalarType::Float: return ElementType::float32;
    case ScalarType::Half: return ElementType::float16;
    case ScalarType::BFloat16: return ElementType::bfloat16;
    case ScalarType::Float8_e4m3fn: return ElementType::float8_e4m3fn;
    case ScalarType::Float8_e4m3fnuz: return ElementType::float8_e4m3fnuz;
    case ScalarType::Float8_e5m2: return ElementType::float8_e5m2;
    case ScalarType::Float8_e5m2fnuz: return ElementType::float8_e5m2fnuz;
    default:
      STD_TORCH_CHECK(false, "lnprune: expected a real floating-point dtype, got ",
                      torch::headeronly::toString(tensor.scalar_type()));
  }
}

// An uninitialised tensor on the device of `like`.
Tensor new_tensor(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                  const Tensor& like) {
  int32_t device_type = 0;
  int32_t device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

Tensor new_vector(int64_t length, int32_t dtype, const Tensor& like) {
  const int64_t stride = 1;
  return new_tensor(1, &length, &stride, dtype, like);
}

// A tensor seen along one dim. Where its elements are not one dense block, `tensor` is a dense
// copy.
struct View {
  Tensor tensor;
  ElementType type;
  Slices slices;
};

View view_along(Tensor tensor, int64_t dim) {
  const auto sizes = tensor.sizes();
  const int64_t dims = static_cast<int64_t>(sizes.size());
  STD_TORCH_CHECK(dim >= -dims && dim < dims, "lnprune: expected a dim in [", -dims, ", ", dims,
                  "), got ", dim);
  const ElementType type = element_type(tensor);
  if (!is_dense(sizes.data(), tensor.strides().data(), dims)) tensor = torch::stable::clone(tensor);
  const Slices slices =
      make_slices(tensor.sizes().data(), tensor.strides().data(), dims, dim < 0 ? dim + dims : dim);
  STD_TORCH_CHECK(slices.elements() > 0, "lnprune: expected a tensor with elements, got none");
  return {std::move(tensor), type, slices};
}

bool same_layout(const Tensor& a, const Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() && a.strides() == b.strides();
}

std::vector<View> views_along(const Tensors& tensors, const std::vector<int64_t>& dims) {
  STD_TORCH_CHECK(tensors.size() == dims.size(), "lnprune: expected one dim per tensor, got ",
                  dims.size(), " for ", tensors.size());
  std::vector<View> views;
  views.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) views.push_back(view_along(tensors[i], dims[i]));
  return views;
}

// A dense output, backed by huge pages where it is large.
Tensor new_like(const View& view) {
  constexpr int64_t kWorthAdvice = int64_t{4} << 20;
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(view.tensor.get(), &dtype));
  const auto sizes = view.tensor.sizes();
  Tensor tensor = new_tensor(static_cast<int64_t>(sizes.size()), sizes.data(),
                             view.tensor.strides().data(), dtype, view.tensor);
  const int64_t bytes = view.slices.elements() * static_cast<int64_t>(view.tensor.element_size());
  if (bytes >= kWorthAdvice) cpu::advise_huge_pages(tensor.mutable_data_ptr(), bytes);
  return tensor;
}

void parallel_for(int64_t count, int64_t grain, cpu::Body body, void* context) {
  if (count <= grain) {
    if (count > 0) body(context, 0, count);
    return;
  }
  torch::stable::parallel_for(0, count, grain,
                              [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

void rank(const std::vector<View>& views, double p, const std::vector<double*>& norms) {
  STD_TORCH_CHECK(p == p, "lnprune: expected a norm of a real order, got NaN");
  std::vector<RankItem> items(views.size());
  for (size_t i = 0; i < views.size(); ++i) {
    items[i] = {views[i].tensor.const_data_ptr(), views[i].type, views[i].slices, norms[i]};
  }
  cpu::rank(items.data(), items.size(), norm_order(p), parallel_for);
}

Tensors channel_norms(Tensors tensors, std::vector<int64_t> dims, double p) {
  const std::vector<View> views = views_along(tensors, dims);
  Tensors norms;
  std::vector<double*> pointers;
  norms.reserve(views.size());
  pointers.reserve(views.size());
  for (const View& view : views) {
    norms.push_back(new_vector(view.slices.channels, aoti_torch_dtype_float64(), view.tensor));
    pointers.push_back(static_cast<double*>(norms.back().mutable_data_ptr()));
  }
  rank(views, p, pointers);
  return norms;
}

void check_amounts(size_t tensors, const std::vector<int64_t>& counts,
                   const std::vector<double>& fractions) {
  STD_TORCH_CHECK(counts.size() == tensors && fractions.size() == tensors,
                  "lnprune: expected one count and one fraction per tensor, got ", counts.size(),
                  " and ", fractions.size(), " for ", tensors);
  for (double fraction : fractions) {
    STD_TORCH_CHECK(fraction >= 0 && fraction <= 1, "lnprune: expected fractions in [0, 1], got ",
                    fraction);
  }
}

const double* norms_of(const Tensor& tensor) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == ScalarType::Double && tensor.dim() == 1 && tensor.is_contiguous(),
      "lnprune: expected contiguous float64 norms with one dim, got ",
      torch::headeronly::toString(tensor.scalar_type()), " with ", tensor.dim());
  return static_cast<const double*>(tensor.const_data_ptr());
}

Tensors select_channels(Tensors norms, Tensors mask_counts, std::vector<int64_t> counts,
                        std::vector<double> fractions) {
  check_amounts(norms.size(), counts, fractions);
  STD_TORCH_CHECK(mask_counts.empty() || mask_counts.size() == norms.size(),
                  "lnprune: expected no mask counts or one per tensor, got ", mask_counts.size());
  Tensors keep;
  std::vector<SelectItem> items(norms.size());
  for (size_t i = 0; i < norms.size(); ++i) {
    const double* values = norms_of(norms[i]);
    const double* mask_values = mask_counts.empty() ? nullptr : norms_of(mask_counts[i]);
    const int64_t channels = norms[i].numel();
    STD_TORCH_CHECK(mask_counts.empty() || mask_counts[i].numel() == channels,
                    "lnprune: expected a mask count for each of ", channels, " channels");
    keep.push_back(new_vector(channels, aoti_torch_dtype_bool(), norms[i]));
    items[i] = {values,    mask_values,  channels,
                counts[i], fractions[i], static_cast<bool*>(keep.back().mutable_data_ptr())};
  }
  cpu::select(items.data(), items.size(), parallel_for);
  return keep;
}

// What the write step reads and makes, for a list of tensors. Masks and originals are one per
// tensor or none: no masks stand for masks of ones, and without originals no weights are made.
struct Writing {
  const std::vector<View>& masks;
  const std::vector<View>&
      layouts;  // of the new masks: the masks, or where there are none the scores
  const Tensors& originals;
  Tensors new_masks;
  Tensors weights;
};

std::vector<View> view_masks(const Tensors& masks, const std::vector<View>& scores,
                             const std::vector<int64_t>& dims) {
  STD_TORCH_CHECK(masks.empty() || masks.size() == scores.size(),
                  "lnprune: expected no masks or one per tensor, got ", masks.size());
  std::vector<View> views;
  views.reserve(masks.size());
  for (size_t i = 0; i < masks.size(); ++i) {
    STD_TORCH_CHECK(masks[i].scalar_type() == scores[i].tensor.scalar_type() &&
                        masks[i].sizes() == scores[i].tensor.sizes(),
                    "lnprune: expected a mask of the shape and dtype of the scores");
    // A repeated mask is contiguous whatever the layout of the one before.
    views.push_back(view_along(torch::stable::contiguous(masks[i]), dims[i]));
  }
  return views;
}

void make_outputs(Writing& writing) {
  const Tensors& originals = writing.originals;
  const size_t count = writing.layouts.size();
  STD_TORCH_CHECK(originals.empty() || originals.size() == count,
                  "lnprune: expected no originals or one per tensor, got ", originals.size());
  writing.new_masks.reserve(count);
  writing.weights.reserve(originals.size());
  for (const View& layout : writing.layouts) writing.new_masks.push_back(new_like(layout));
  for (size_t i = 0; i < originals.size(); ++i) {
    STD_TORCH_CHECK(
        same_layout(writing.new_masks[i], originals[i]),
        "lnprune: expected an original of the shape, strides and dtype of its new mask");
    writing.weights.push_back(new_like(writing.layouts[i]));
  }
}

void write(const Writing& writing, const std::vector<const bool*>& keep) {
  std::vector<WriteItem> items(keep.size());
  const bool with_weight = !writing.originals.empty();
  for (size_t i = 0; i < keep.size(); ++i) {
    items[i] = {keep[i],
                writing.masks.empty() ? nullptr : writing.masks[i].tensor.const_data_ptr(),
                with_weight ? writing.originals[i].const_data_ptr() : nullptr,
                writing.new_masks[i].mutable_data_ptr(),
                with_weight ? writing.weights[i].mutable_data_ptr() : nullptr,
                writing.layouts[i].type,
                writing.layouts[i].slices};
  }
  cpu::write(items.data(), items.size(), parallel_for);
}

std::tuple<Tensors, Tensors> write_masks(Tensors keep, Tensors scores, Tensors masks,
                                         Tensors originals, std::vector<int64_t> dims) {
  STD_TORCH_CHECK(keep.size() == scores.size(), "lnprune: expected keep flags for each of ",
                  scores.size(), " tensors, got ", keep.size());
  const std::vector<View> views = views_along(scores, dims);
  std::vector<const bool*> flags;
  for (size_t i = 0; i < keep.size(); ++i) {
    STD_TORCH_CHECK(keep[i].scalar_type() == ScalarType::Bool && keep[i].dim() == 1 &&
                        keep[i].is_contiguous() && keep[i].numel() == views[i].slices.channels,
                    "lnprune: expected ", views[i].slices.channels,
                    " contiguous bool keep flags, got ", keep[i].numel(), " of ",
                    torch::headeronly::toString(keep[i].scalar_type()));
    flags.push_back(static_cast<const bool*>(keep[i].const_data_ptr()));
  }
  const std::vector<View> mask_views = view_masks(masks, views, dims);
  const std::vector<View>& layouts = masks.empty() ? views : mask_views;
  Writing writing{mask_views, layouts, originals, {}, {}};
  make_outputs(writing);
  write(writing, flags);
  return {std::move(writing.new_masks), std::move(writing.weights)};
}

std::tuple<Tensors, Tensors> prune_channels(Tensors scores, Tensors masks, Tensors originals,
                                            std::vector<int64_t> dims, double p,
                                            std::vector<int64_t> counts,
                                            std::vector<double> fractions) {
  check_amounts(scores.size(), counts, fractions);
  const std::vector<View> views = views_along(scores, dims);
  const std::vector<View> mask_views = view_masks(masks, views, dims);
  const std::vector<View>& layouts = masks.empty() ? views : mask_views;
  Writing writing{mask_views, layouts, originals, {}, {}};
  make_outputs(writing);

  // One block for the norms of all tensors, one for the mask counts, one for the flags.
  int64_t channels = 0;
  for (const View& view : views) channels += view.slices.channels;
  const std::unique_ptr<double[]> norms(new double[channels]);
  const std::unique_ptr<double[]> mask_counts(masks.empty() ? nullptr : new double[channels]);
  const std::unique_ptr<bool[]> keep(new bool[channels]);
  std::vector<double*> norm_pointers;
  std::vector<double*> count_pointers;
  std::vector<const bool*> flags;
  std::vector<SelectItem> items;
  norm_pointers.reserve(views.size());
  count_pointers.reserve(masks.size());
  flags.reserve(views.size());
  items.reserve(views.size());
  int64_t offset = 0;
  for (size_t i = 0; i < views.size(); ++i) {
    norm_pointers.push_back(norms.get() + offset);
    if (!masks.empty()) count_pointers.push_back(mask_counts.get() + offset);
    flags.push_back(keep.get() + offset);
    items.push_back({norm_pointers[i], masks.empty() ? nullptr : count_pointers[i],
                     views[i].slices.channels, counts[i], fractions[i], keep.get() + offset});
    offset += views[i].slices.channels;
  }

  rank(views, p, norm_pointers);
  if (!masks.empty()) rank(mask_views, 0, count_pointers);
  cpu::select(items.data(), items.size(), parallel_for);
  write(writing, flags);
  return {std::move(writing.new_masks), std::move(writing.weights)};
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = std::to_string(TORCH_VERSION_MAJOR) + "." + std::to_string(TORCH_VERSION_MINOR) +
                  "." + std::to_string(TORCH_VERSION_PATCH);
  info["compiler"] = __VERSION__;
  info["instruction_set"] = cpu::instruction_set();
  return info;
}

}  // namespace
}  // namespace lnprune

STABLE_TORCH_LIBRARY(lnprune, m) {
  m.def("channel_norms(Tensor[] tensors, int[] dims, float p) -> Tensor[]");
  m.def(
      "select_channels(Tensor[] norms, Tensor[] mask_counts, int[] counts, float[] fractions)"
      " -> Tensor[]");
  m.def(
      "write_masks(Tensor[] keep, Tensor[] scores, Tensor[] masks, Tensor[] originals, int[] dims)"
      " -> (Tensor[], Tensor[])");
  m.def(
      "prune_channels(Tensor[] scores, Tensor[] masks, Tensor[] originals, int[] dims, float p,"
      " int[] counts, float[] fractions) -> (Tensor[], Tensor[])");
}

STABLE_TORCH_LIBRARY_IMPL(lnprune, CPU, m) {
  m.impl("channel_norms", TORCH_BOX(&lnprune::channel_norms));
  m.impl("select_channels", TORCH_BOX(&lnprune::select_channels));
  m.impl("write_masks", TORCH_BOX(&lnprune::write_masks));
  m.impl("prune_channels", TORCH_BOX(&lnprune::prune_channels));
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("build_info", &lnprune::build_info); }
