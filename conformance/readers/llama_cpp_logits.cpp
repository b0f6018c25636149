// Logits of llama.cpp: llama_cpp_logits TOKENS OUT MODEL.gguf [ADAPTER.gguf ...]
//
// TOKENS is a file with a JSON list of token ids. The program writes the logits of this document, with all adapters
// active, to OUT as JSON. Attention and its cache are in float32. LLAMA_CPP is a checkout that was built in its folder
// `build` without shared libraries:
//
//     g++ -O2 llama_cpp_logits.cpp -o llama_cpp_logits -I LLAMA_CPP/include -I LLAMA_CPP/ggml/include \
//         LLAMA_CPP/build/src/libllama.a LLAMA_CPP/build/ggml/src/libggml{,-cpu,-base}.a -fopenmp -lpthread -ldl

#include <cstdio>
#include <fstream>
#include <vector>

#include "llama.h"

int main(int count, char ** words) {
    llama_log_set([](ggml_log_level level, const char * text, void *) {
        if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
    }, nullptr);

    std::vector<llama_token> tokens;
    std::ifstream file(words[1]);
    char mark;  // [ and commas
    for (llama_token token; file >> mark >> token;) tokens.push_back(token);

    llama_model * model = llama_model_load_from_file(words[3], llama_model_default_params());
    if (!model) return 1;
    std::vector<llama_adapter_lora *> adapters;
    for (int i = 4; i < count; i++) {
        adapters.push_back(llama_adapter_lora_init(model, words[i]));
        if (!adapters.back()) return 1;
    }

    llama_context_params params = llama_context_default_params();
    params.type_k = params.type_v = GGML_TYPE_F32;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    llama_context * context = llama_init_from_model(model, params);
    if (!context) return 1;
    std::vector<float> scales(adapters.size(), 1);
    if (llama_set_adapters_lora(context, adapters.data(), adapters.size(), scales.data())) return 1;

    llama_batch batch = llama_batch_init(tokens.size(), 0, 1);
    for (llama_token token : tokens) {
        int i = batch.n_tokens++;
        batch.token[i] = token;
        batch.pos[i] = i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = true;
    }
    if (llama_decode(context, batch)) return 1;

    FILE * out = fopen(words[2], "w");
    const int vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
    for (int i = 0; i < batch.n_tokens; i++) {
        const float * logits = llama_get_logits_ith(context, i);
        for (int k = 0; k < vocabulary; k++) fprintf(out, "%s%.9g", k ? ", " : i ? "], [" : "[[", logits[k]);
    }
    fputs("]]\n", out);
    return fclose(out);
}
