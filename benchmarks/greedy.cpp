// greedy MODEL.gguf N: for each line of token ids on stdin, the N tokens that llama.cpp continues it with, most likely first.
#include "llama.h"
#include <cstdio>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

int main(int, char ** argv) {
    ggml_backend_load_all();
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    auto how = llama_model_default_params();
    how.n_gpu_layers = 0;
    llama_model * model = llama_model_load_from_file(argv[1], how);
    if (!model) { fprintf(stderr, "%s cannot be loaded\n", argv[1]); return 1; }
    const int count = std::stoi(argv[2]);
    for (std::string line; std::getline(std::cin, line);) {
        std::vector<llama_token> ids;
        std::istringstream numbers(line);
        for (int id; numbers >> id;) ids.push_back(id);
        auto shape = llama_context_default_params();
        shape.n_ctx = shape.n_batch = ids.size() + count + 8;
        shape.n_threads = shape.n_threads_batch = 1;
        shape.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
        shape.type_k = shape.type_v = GGML_TYPE_F32;
        llama_context * context = llama_init_from_model(model, shape);
        llama_sampler * likeliest = llama_sampler_init_greedy();
        llama_batch batch = llama_batch_get_one(ids.data(), ids.size());
        for (int i = 0; i < count; i++) {
            if (llama_decode(context, batch)) { fprintf(stderr, "decoding failed\n"); return 1; }
            llama_token next = llama_sampler_sample(likeliest, context, -1);
            printf("%d ", next);
            if (llama_vocab_is_eog(llama_model_get_vocab(model), next)) break;
            batch = llama_batch_get_one(&next, 1);
        }
        printf("\n");
        llama_sampler_free(likeliest);
        llama_free(context);
    }
}
