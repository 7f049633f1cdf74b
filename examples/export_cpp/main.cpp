// Runs a package of `pab_fx.export` without Python: attention is broadcast by the package itself.
//
//   broadcast PACKAGE CALLS OUTPUTS
//
// PACKAGE  from torch._inductor.aoti_compile_and_package
// CALLS    torch.save of a list with an entry for each call: the list of its input tensors, those of the arguments in the
//          order in which they were exported, pab_context last. An empty list begins a new generation.
// OUTPUTS  receives a tuple with the tuple of each call's output tensors, for torch.load
//
// Build it with the libtorch (or the torch of pip) that made the package:
//
//   g++ -std=c++20 main.cpp -o broadcast -I$TORCH/include -I$TORCH/include/torch/csrc/api/include
//       -L$TORCH/lib -Wl,-rpath,$TORCH/lib -ltorch -ltorch_cpu -lc10

#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

using torch::inductor::AOTIModelPackageLoader;

std::vector<char> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    throw std::runtime_error("cannot read " + path);
  }
  return {std::istreambuf_iterator<char>(file), {}};
}

void write(const std::string& path, const std::vector<char>& bytes) {
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!file) {
    throw std::runtime_error("cannot write " + path);
  }
}

std::vector<at::Tensor> tensors(const c10::IValue& list) {
  std::vector<at::Tensor> result;
  for (const c10::IValue& item : list.toListRef()) {
    result.push_back(item.toTensor());
  }
  return result;
}

// The next call begins a generation, whatever its timestep. For several contexts: one zero for each.
void reset(AOTIModelPackageLoader& model) {
  std::unordered_map<std::string, at::Tensor> calls{{"pab_calls", torch::zeros({}, torch::kFloat64)}};
  model.load_constants(calls, /*use_inactive=*/false, /*check_full_update=*/false);
}

int main(int argc, char** argv) try {
  if (argc != 4) {
    throw std::runtime_error("usage: broadcast PACKAGE CALLS OUTPUTS");
  }
  const c10::InferenceMode no_gradients;
  const c10::IValue calls = torch::pickle_load(read(argv[2]));
  AOTIModelPackageLoader model(argv[1]);
  std::vector<c10::IValue> outputs;
  for (const c10::IValue& call : calls.toListRef()) {
    const std::vector<at::Tensor> inputs = tensors(call);
    if (inputs.empty()) {
      reset(model);
    } else {
      const std::vector<at::Tensor> output = model.run(inputs);
      outputs.push_back(c10::ivalue::Tuple::create(std::vector<c10::IValue>(output.begin(), output.end())));
    }
  }
  const size_t count = outputs.size();
  write(argv[3], torch::pickle_save(c10::ivalue::Tuple::create(std::move(outputs))));
  std::cout << count << " calls\n";
  return 0;
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
