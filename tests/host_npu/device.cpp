// Two devices of PyTorch's PrivateUse1, which is what Ascend NPUs are, in the memory of the host.
//
// Every operator runs on the CPU on copies, but for those that make tensors and views. Streams and
// events are there, and have nothing to wait for.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <optional>

namespace {

using c10::DeviceIndex;
using c10::IntArrayRef;
using c10::SymIntArrayRef;

constexpr auto NPU = c10::DeviceType::PrivateUse1;
constexpr DeviceIndex DEVICES = 2;
constexpr size_t ALIGNMENT = 64;

thread_local DeviceIndex current_device = 0;
thread_local c10::StreamId current_streams[DEVICES] = {};

DeviceIndex index_of(c10::Device device) {
  return device.index() < 0 ? current_device : device.index();
}

// ---- memory ----

std::atomic<int64_t> allocated{0}, most_allocated{0};

struct Block {
  void* data;
  int64_t bytes;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  allocated -= block->bytes;
  std::free(block->data);
  delete block;
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const size_t rounded = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    void* data = bytes ? std::aligned_alloc(ALIGNMENT, rounded) : nullptr;
    const int64_t now = allocated += static_cast<int64_t>(bytes);
    int64_t most = most_allocated;
    while (now > most && !most_allocated.compare_exchange_weak(most, now)) {
    }
    auto* block = new Block{data, static_cast<int64_t>(bytes)};
    return {data, block, &release, c10::Device(NPU, current_device)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

Memory memory;
REGISTER_ALLOCATOR(NPU, &memory);

// ---- devices, streams, events ----

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return NPU; }
  DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  c10::Device getDevice() const override { return {NPU, current_device}; }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() < DEVICES, "there are ", int(DEVICES), " NPUs");
    current_device = index_of(device);
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    current_device = index_of(device);
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto before = getDevice();
    setDevice(device);
    return before;
  }

  static c10::Stream stream(DeviceIndex index, c10::StreamId id) {
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(NPU, index), id);
  }
  c10::Stream getStream(c10::Device device) const override {
    return stream(index_of(device), current_streams[index_of(device)]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return stream(index_of(device), 0);
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    static std::atomic<c10::StreamId> last{0};
    return stream(index_of(device), ++last);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return getNewStream(device, 0);
  }
  c10::Stream exchangeStream(c10::Stream next) const override {
    auto before = getStream(next.device());
    current_streams[next.device_index()] = next.id();
    return before;
  }

  void record(void** event, const c10::Stream&, DeviceIndex, c10::EventFlag) const override {
    *event = &memory;
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(DeviceIndex) const override {}
  double elapsedTime(void*, void*, DeviceIndex) const override { return 1.0; }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Generator final : at::CPUGeneratorImpl {
  explicit Generator(DeviceIndex index) {
    device_ = c10::Device(NPU, index);
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return DEVICES; }
  DeviceIndex getCurrentDevice() const override { return current_device; }
  void setCurrentDevice(DeviceIndex index) const override { current_device = index; }
  DeviceIndex exchangeDevice(DeviceIndex index) const override {
    return std::exchange(current_device, index);
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override {
    return exchangeDevice(index);
  }
  bool isPinnedPtr(const void*) const override { return false; }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override {
    static at::Generator all[DEVICES] = {
        at::make_generator<Generator>(0), at::make_generator<Generator>(1)};
    return all[index < 0 ? current_device : index];
  }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    return at::make_generator<Generator>(index < 0 ? current_device : index);
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto data = memory.allocate(bytes);
    if (const auto kept = std::min(bytes, storage.nbytes())) {
      std::memcpy(data.get(), storage.data(), kept);
    }
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(data));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

const bool registered = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  return true;
}();

// ---- operators ----

// A tensor of the CPU's in the same memory.
at::Tensor on_host(const at::Tensor& x) {
  if (x.is_cpu()) {
    return x;
  }
  auto options = x.options().device(at::kCPU);
  return at::for_blob(x.data_ptr(), x.sizes()).strides(x.strides()).options(options).make_tensor();
}

struct OnDevice {
  explicit OnDevice(std::optional<at::Device> device) : before(current_device) {
    if (device) {
      current_device = index_of(*device);
    }
  }
  ~OnDevice() { current_device = before; }
  DeviceIndex before;
};

at::Tensor empty(
    SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>,
    std::optional<at::MemoryFormat> format) {
  OnDevice there(device);
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
      c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    SymIntArrayRef size, SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  OnDevice there(device);
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &memory,
      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  if (to.numel()) {
    on_host(to).copy_(on_host(from));
  }
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

std::optional<at::Tensor> given_on_host(const std::optional<at::Tensor>& x) {
  return x && x->defined() ? std::optional(on_host(*x)) : std::nullopt;
}

at::Tensor convolution(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation, bool transposed,
    SymIntArrayRef output_padding, c10::SymInt groups) {
  auto y = at::convolution_symint(
      on_host(x), on_host(weight), given_on_host(bias), stride, padding, dilation, transposed,
      output_padding, std::move(groups));
  return y.contiguous().to(x.device());
}

// What other devices run in its place takes no columns in torch 2.14.
std::tuple<at::Tensor, at::Tensor, at::Tensor> group_norm(
    const at::Tensor& x, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, c10::SymInt N, c10::SymInt C, c10::SymInt HxW,
    int64_t groups, double epsilon) {
  auto [y, mean, rstd] = at::native_group_norm_symint(
      on_host(x).contiguous(), given_on_host(weight), given_on_host(bias), std::move(N),
      std::move(C), std::move(HxW), groups, epsilon);
  return {y.to(x.device()), mean.to(x.device()), rstd.to(x.device())};
}

// ``parameter.data = tensor`` between the host and a device, which PyTorch allows its own devices.
bool may_replace(const at::Tensor& self, const at::Tensor& from) {
  auto plain = [](const at::Tensor& x) {
    return x.layout() == at::kStrided && (x.is_cpu() || x.is_privateuseone());
  };
  return (plain(self) && plain(from)) ||
      self.unsafeGetTensorImpl()->has_compatible_shallow_copy_type(from.key_set());
}

// Other devices take no operand from elsewhere, but for numbers.
void refuse_mixed(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  std::optional<at::Device> here;
  auto check = [&](const at::Tensor& x) {
    if (!x.defined() || x.dim() == 0) {
      return;
    }
    TORCH_CHECK(here.value_or(x.device()) == x.device(), "Expected all tensors to be on the same "
        "device, but ", op.schema().name(), " got some on ", *here, " and ", x.device());
    here = x.device();
  };
  for (const auto& argument : torch::jit::last(stack, op.schema().arguments().size())) {
    if (argument.isTensor()) {
      check(argument.toTensor());
    } else if (argument.isTensorList()) {
      for (const at::Tensor& x : argument.toTensorVector()) {
        check(x);
      }
    }
  }
}

void compute_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  refuse_mixed(op, *stack);
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&compute_on_host>());
}

TORCH_LIBRARY_IMPL(aten, CompositeImplicitAutograd, m) {
  m.impl("_has_compatible_shallow_copy_type", may_replace);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("convolution_overrideable", convolution);
  m.impl("native_group_norm", group_norm);
  m.impl("_local_scalar_dense", [](const at::Tensor& x) { return on_host(x).item(); });
  m.impl(
      "resize_",
      [](const at::Tensor& x, SymIntArrayRef size, std::optional<at::MemoryFormat> format)
          -> const at::Tensor& {
        return at::native::resize_(x, C10_AS_INTARRAYREF_SLOW(size), format);
      });
  m.impl(
      "as_strided",
      [](const at::Tensor& x, IntArrayRef size, IntArrayRef stride, std::optional<int64_t> offset) {
        return at::native::as_strided_tensorimpl(x, size, stride, offset);
      });
  m.impl("view", [](const at::Tensor& x, IntArrayRef size) { return at::native::view(x, size); });
  m.impl("_reshape_alias", [](const at::Tensor& x, IntArrayRef size, IntArrayRef stride) {
    return at::native::_reshape_alias(x, size, stride);
  });
  m.impl("unfold", [](const at::Tensor& x, int64_t dim, int64_t size, int64_t step) {
    return at::native::unfold(x, dim, size, step);
  });
  m.impl("view_as_real", [](const at::Tensor& x) { return at::native::view_as_real(x); });
  m.impl("view_as_complex", [](const at::Tensor& x) { return at::native::view_as_complex(x); });
  m.impl("set_.source_Storage", [](at::Tensor& x, at::Storage source) -> at::Tensor& {
    return at::native::set_(x, source);
  });
  m.impl(
      "set_.source_Storage_storage_offset",
      [](at::Tensor& x, at::Storage source, int64_t offset, IntArrayRef size, IntArrayRef stride)
          -> at::Tensor& { return at::native::set_storage_cpu_(x, source, offset, size, stride); });
}

}  // namespace

extern "C" int64_t memory_allocated() { return allocated; }
extern "C" int64_t max_memory_allocated() { return most_allocated; }
extern "C" void reset_peak_memory_stats() { most_allocated = allocated.load(); }
extern "C" int current() { return current_device; }
extern "C" void make_current(int index) { current_device = static_cast<DeviceIndex>(index); }
