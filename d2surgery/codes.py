"""Every problem code: what it means and what to do about it."""

from typing import NamedTuple


class Code(NamedTuple):
    meaning: str
    remedy: str


CODES: dict[str, Code] = {
    # The file itself.
    "FILE_MISSING": Code("There is nothing at this path.", "Check the path; a hub id is written org/name[@revision]."),
    "FILE_EMPTY": Code("The file has no bytes.", "Download or save it again."),
    "FILE_UNREADABLE": Code("The operating system refused to read or write here.", "Check permissions and the disk."),
    "OUT_OF_MEMORY": Code(
        "The system gave no more memory.", "Close other programs, give --max-memory, or take a larger machine."
    ),
    "UNFORESEEN": Code(
        "An error that d2surgery does not foresee: a fault of its own, or of a library under it. Nothing was decided.",
        "Run it again with --debug, which shows where it came from, and report both; SECURITY.md says how.",
    ),
    "LFS_POINTER": Code(
        "The file is a Git LFS pointer: a clone without LFS left the address of the weights, not the weights.",
        "Run `git lfs pull` in the clone, or download the file from the hub.",
    ),
    "NOT_SAFETENSORS": Code(
        "The file does not begin like a safetensors file.",
        "Give a .safetensors or .bin file, or save what it holds as one.",
    ),
    "PICKLE": Code(
        "The file is a pickle, and not one of tensors by name alone: nothing else is loaded, for it could run code.",
        "Load it where you trust it and save its tensors by name as safetensors.",
    ),
    "NOT_AN_ADAPTER": Code(
        "The file is something else than an adapter: a model's own weights, an optimizer's state, a config.",
        "Give the adapter's weights, adapter_model.safetensors or .bin, or the directory that holds them.",
    ),
    "TRUNCATED_FILE": Code("The file ends before its header says it does.", "Download or copy it again."),
    "CORRUPT_HEADER": Code(
        "The safetensors header is not one JSON object of tensor entries within its stated length.",
        "Download or save the file again.",
    ),
    "DUPLICATE_KEY": Code(
        "One tensor stands twice, in a header or in two files; readers would silently keep the last.",
        "Save the file again with distinct names.",
    ),
    "BAD_TENSOR_ENTRY": Code(
        "A tensor's entry in the header contradicts itself, its neighbours or the file's size.",
        "Save the file again; its bytes cannot be trusted to belong to the names.",
    ),
    "NO_WEIGHTS": Code("The directory holds no adapter weights.", "Expected adapter_model.safetensors or .bin in it."),
    "SEVERAL_WEIGHTS": Code("The directory holds several weight files.", "Name the one you mean."),
    "HUB_UNREACHABLE": Code("The hub id could not be downloaded.", "Check the id, the network and your token."),
    "PUSH_REFUSED": Code(
        "The hub did not take the upload.",
        "Log in with a token that may write (`hf auth login`, or HF_TOKEN), and check the repository's name.",
    ),
    "LEFT_OUT": Code(
        "Another file of weights lies beside the adapter's. Only the adapter's is read: its safetensors where there is "
        "a .bin, too, as in PEFT; and non_lora_trainables.bin or non_lora_state_dict.bin, whose names say where each "
        "tensor belongs. new_embeddings.safetensors does not say which rows its embeddings are.",
        "See what it holds. What was trained in it is not in the merge: put it into the base, or train it through "
        "modules_to_save, which keeps it in the adapter's file.",
    ),
    # What surgery makes of it.
    "ERROR_TOO_LARGE": Code(
        "What was asked for can only be had with a larger error than allowed.",
        "Allow the rank that the message names, a larger error, or merge the adapter instead.",
    ),
    "REPLACEMENTS_DISAGREE": Code(
        "Several of the adapters bring a whole weight or token rows of their own, and they differ.",
        "Only one of them can stand in the result: leave it out of the others.",
    ),
    "OTHER_PARTS": Code(
        "The adapters given are not those that a combination says it is made of.",
        "Give the files that `d2surgery inspect` shows under made, in that order.",
    ),
    "OTHER_COMBINATION": Code(
        "A combination is farther from what its parts give than it says.",
        "Combine them again; the file was changed since, or its header is another's.",
    ),
    "BUDGET": Code(
        "Not even rank 1 on every module fits into the budget.",
        "Allow more, or give only the modules that matter (--modules).",
    ),
    # What an adapter file says.
    "MISSING_CONFIG": Code(
        "There is no adapter_config.json beside the weights and none inside the file, so the scaling is unknown.",
        "Put the adapter_config.json of the same training beside the weights, or give --scale or --alpha.",
    ),
    "BAD_CONFIG": Code("A config cannot be used as it stands.", "Correct the named field."),
    "CONFIG_DISAGREES": Code(
        "adapter_config.json and the config inside the weights file differ; the former was used.",
        "Save the adapter again so that both agree.",
    ),
    "UNKNOWN_CONFIG_FIELD": Code(
        "The config has a field this version does not know; it may change the numbers.",
        "Check what wrote it; PEFT drops such fields with a warning.",
    ),
    "UNSUPPORTED_METHOD": Code(
        "The file holds another method than LoRA, DoRA, Dual LoRA or D2-LoRA.",
        "Merge it with the tool that trained it (PEFT's merge_and_unload); where a LoRA will do, `d2surgery extract "
        "--base BASE --tuned MERGED --out OUT` makes one of the difference, with its error.",
    ),
    "UNSUPPORTED_VARIANT": Code(
        "A variant of LoRA, or a part of an adapter, whose change of the weights is not scaling times B times A.",
        "Merge it with the tool that trained it, where that can, or train without the variant.",
    ),
    "MUTATED_BASE": Code(
        "The initialisation changed the base weights, so base + scaling·B·A is not the trained model.",
        "If the changed base was saved (PEFT calls it the residual model), give it as the base and set "
        "init_lora_weights to true in adapter_config.json: residual + scaling·B·A is the trained model. If the first "
        "factors were saved, set it to true in both configs: `d2surgery combine TRAINED FIRST:-1 --out PLAIN` is the "
        "plain LoRA of the original base. Else save with path_initial_model_for_weight_conversion, which makes one.",
    ),
    "MERGED_LINEAR": Code(
        "The factors are those of MergedLinear in PEFT 0.1 and 0.2 (enable_lora): several products of one module, "
        "one for each part of a fused layer, the other parts left out.",
        "Merge it with PEFT 0.2, which alone reads it, or train again with today's PEFT.",
    ),
    "LAYER_REPLICATION": Code(
        "The adapter belongs to a model with repeated layers; its layer numbers do not name layers of this base.",
        "Materialise the replicated base first.",
    ),
    "OLD_EXPERT_PACKING": Code(
        "How the experts' factors are packed cannot be told: PEFT 0.19.0 did it another way for some models, and here "
        "the config does not say which PEFT it was.",
        "Set peft_version in adapter_config.json to the version that trained it (PEFT 0.19.0: load and save it there).",
    ),
    "EXPERT_LAYOUT_ASSUMED": Code(
        "Nothing in the file says how the experts share the columns of lora_B. It is read as PEFT packs them; unsloth "
        "before 17 September 2026 packed them grouped by expert, and a file read the wrong way gives every expert "
        "another's columns.",
        "If an unsloth of before that day trained it, give --expert-layout grouped, otherwise interleaved.",
    ),
    "AMBIGUOUS_PARAMETER": Code(
        "Several parameters of one module are adapted and the file does not say which factors belong to which.",
        "Only gate_up_proj, gate_proj, up_proj and down_proj have a known order; train one parameter per adapter "
        "otherwise.",
    ),
    "FOREIGN_FORMAT": Code(
        "The keys are those of an adapter format that this version recognises and does not read.",
        "Convert it to PEFT's form with the tool that wrote it.",
    ),
    "FORMAT_CANNOT_HOLD": Code(
        "The format to be written has no place for part of the adapter.",
        "Choose another format, make it a kind that the format has (convert --kind lora --max-error …), or merge it.",
    ),
    "ENGINE_REFUSES": Code(
        "The engine ends with an error on this part of the adapter, or does not load the file at all.",
        "`d2surgery convert --for ENGINE` writes what it takes; a DoRA with --kind lora, which says what that loses.",
    ),
    "ENGINE_DROPS": Code(
        "The engine loads the file and leaves this part out without a word.",
        "Merge the adapter, or serve it with an engine that applies all of it.",
    ),
    "ENGINE_MISREADS": Code(
        "The engine applies this part otherwise than it was trained: at another scaling, or as another kind.",
        "`d2surgery convert --for ENGINE` writes a file in which nothing can be misread; or merge it.",
    ),
    "ENGINE_OPTION": Code(
        "The engine takes the adapter only when it is started with an option.",
        "Start it so.",
    ),
    "MIXED_FORMATS": Code(
        "Some tensors are named as one adapter format names them, others as another does.",
        "Find out what wrote it, and save each adapter in a file of its own.",
    ),
    "SCALING_UNKNOWN": Code(
        "Neither the file nor a config beside it says what multiplies B·A.",
        "Give --scale, the number itself, or --alpha, which is divided by the rank: `d2surgery convert ADAPTER OUT "
        "--to peft --scale …` writes an adapter that carries it.",
    ),
    "NOT_A_NUMBER": Code(
        "What should be one stored number, such as an alpha, is none.",
        "The file is damaged, or the key means something else in the format that wrote it.",
    ),
    "ALPHA_ZERO": Code(
        "A stored alpha is 0, which the tools that train with it take for the rank: the scaling is 1.",
        "Nothing to do where that is meant; sd-scripts' own merge script takes it for 0.",
    ),
    "ALPHA_OF_SPLIT_QKV": Code(
        "sd-scripts trained q, k and v apart (split_qkv) and saved them as one pair of their ranks' sum with the alpha "
        "of one: every reader, this one too, applies a third or a quarter of what was trained.",
        "Nothing to do to have what other readers have; for what was trained, scale the adapter by what is told here.",
    ),
    "MAGNITUDE_EPSILON": Code(
        "LyCORIS adds the machine epsilon of the stored magnitude's dtype to the norm that it divides by, ComfyUI that "
        "of the weight's. Here nothing is added; in 16 bits the readers differ by up to 1%.",
        "Save the magnitudes in float32, where all readers agree.",
    ),
    "AMBIGUOUS_NAME": Code(
        "A flattened name, with _ for every dot, fits none or several of the model's modules.",
        "Give the base (--base), whose modules are looked up.",
    ),
    "HEADS_UNKNOWN": Code(
        "llama.cpp and torchtune keep the rows of a Llama's q and k in another order within each head, litgpt and "
        "Megatron those of q, k and v in one matrix, and nothing here says how many heads there are.",
        "Give the base (--base), whose config says it.",
    ),
    "BASE_NEEDED": Code(
        "The file does not say a module's size, or which base weights it rescales; the base does.",
        "Give the base (--base), or the whole model that the adapter belongs to.",
    ),
    "READ_BACK_DIFFERS": Code(
        "What was written does not read back as what was meant: a fault of d2surgery's. The files are removed.",
        "Report it with the adapter; PEFT's form (--to peft) is not concerned.",
    ),
    "UNKNOWN_NAME": Code(
        "There is no module or tensor of this name.",
        "Take one of the names that it has: `list(…)` gives them, `d2surgery inspect --per-layer` shows them.",
    ),
    "NO_PANDAS": Code(
        "A data frame needs the Python package pandas.",
        "`pip install pandas`, or take `rows()`, which is a list of plain mappings.",
    ),
    "UNKNOWN_FORMAT": Code("No adapter format known here uses these keys.", "Check that this is an adapter file."),
    "UNKNOWN_TENSOR": Code(
        "A tensor that no known adapter form explains.",
        "Find out what wrote it; merging without it would lose part of the adapter.",
    ),
    "MISSING_HALF": Code(
        "One factor of a pair is missing; PEFT would quietly use the untrained initial value.",
        "Get the complete file.",
    ),
    "MISSING_MAGNITUDE": Code(
        "The config says DoRA but this module has no magnitude vector.",
        "Get the complete file, or correct use_dora if it never was DoRA.",
    ),
    "RANK_MISMATCH": Code(
        "The two factors of a pair do not share a rank.",
        "See what wrote them: the file is damaged, or a variant whose factors are not (r, in) and (out, r).",
    ),
    "RANK_DISAGREES": Code(
        "The rank of the tensors is not the rank the config gives for this module.",
        "Correct r or rank_pattern; the scaling depends on it.",
    ),
    "SHAPE_UNEXPECTED": Code("A tensor does not have the shape its slot needs.", "Get the complete file."),
    "DTYPE_UNEXPECTED": Code(
        "A factor is stored in a dtype that is no float of 16 bits or more: the adapter was quantised, or cast.",
        "Give the adapter as it was trained; where that is lost, save it as F16, BF16 or F32, times its scales.",
    ),
    "EMPTY_TENSOR": Code(
        "A tensor has no elements: a sharded trainer (ZeRO-3, FSDP) saved it without gathering.",
        "Save again from the trainer with its parameters gathered.",
    ),
    "NOTHING_TO_APPLY": Code(
        "The file holds no factor, no replaced weight and no token row: applied, it would give the base again.",
        "Save again from the trainer with its parameters gathered (DeepSpeed ZeRO-3 needs "
        "stage3_gather_16bit_weights_on_model_save), or take the last checkpoint that holds tensors.",
    ),
    "ZERO_UPDATE": Code(
        "The update of a module is exactly zero: no step of training reached it, or it was saved before the first one.",
        "See whether training ran (its loss, its learning rate, what was frozen), and whether this is the last file.",
    ),
    "PROMISED_BUT_ABSENT": Code(
        "The config names what the file does not hold: modules_to_save, token rows, or modules that have no factors.",
        "Nothing to do if it was never trained; else the file is incomplete, and those parts stay as in the base.",
    ),
    "RANK_DOUBTFUL": Code(
        "The rank is larger than the smaller side of the weight; without a config nothing says that it is meant.",
        "See whether the factors lie (in, r) and (r, out), the other way round.",
    ),
    "NOT_FINITE": Code("A tensor holds NaN or infinity.", "The training diverged or the file is damaged."),
    "TWO_ADAPTERS": Code("The file holds the same slot under several adapter names.", "Save one adapter per file."),
    "NOT_TARGETED": Code(
        "The file has factors for a module the config does not target; PEFT would silently ignore them.",
        "Correct target_modules, or remove the tensors.",
    ),
    "AMBIGUOUS_PATTERN": Code(
        "Two rank or alpha patterns with different values match this module; the first in file order counts.",
        "Make the patterns disjoint: PEFT sorts them when it saves, which changes the first.",
    ),
    "PATTERN_UNMATCHED": Code("A rank or alpha pattern matches no module of the file.", "Remove or correct it."),
    "UNDECLARED_REPLACEMENT": Code(
        "The file holds full weights that its config does not name; PEFT loads them over the base's, and so do we.",
        "Nothing to do if they were trained.",
    ),
    "SUPERSEDED": Code(
        "The file holds the weight of a saved module more than once: as trained, as its copy in PEFT's wrapper, and "
        "untrained. Loading, PEFT takes the trained one alone, and so do we.",
        "Nothing to do.",
    ),
    "BIAS_NOT_SAVED": Code(
        "bias='lora_only' was trained, but PEFT 0.7 to 0.20 did not save those biases: they are lost.",
        "Train again with PEFT 0.21 or later if the biases matter.",
    ),
    "PEFT_IGNORES_BIAS": Code(
        "A full bias of an adapted module under its old name; today's PEFT ignores it, we apply it.",
        "Nothing to do if it was trained.",
    ),
    "UNEXPECTED_BIAS": Code(
        "A full bias of an adapted module, although the config says bias='none'.",
        "Correct the config's bias field, or remove the tensor.",
    ),
    "TOKEN_INDICES": Code(
        "Trained token rows and the config's trainable_token_indices do not fit.", "Correct the config."
    ),
    # Where an adapter lands in a base.
    "BAD_BASE": Code(
        "The base is not a directory of weights that are read: safetensors, PyTorch's, or one GGUF model.",
        "Give a Hugging Face model directory, or a GGUF model that is alone in its own.",
    ),
    "MISSING_SHARD": Code("The index names a weight file or tensor that is not there.", "Complete the download."),
    "TWO_SETS_OF_WEIGHTS": Code(
        "More weights lie in the directory than are loaded. transformers takes model.safetensors, then its index, then "
        "pytorch_model.bin, then its index; other loaders take them in another order, or all.",
        "Keep the files that are meant and remove the others.",
    ),
    "INDEX_DISAGREES": Code(
        "The index does not say where the tensors are. transformers reads every tensor of every shard that it names, "
        "and of one in two shards the last shard's.",
        "Save the model again, or write the index anew.",
    ),
    "QUANTIZED_BASE": Code(
        "The base is quantised; adding the adapter on its grid would lose most of it.",
        "Merge into the unquantised base and quantise once afterwards. What was trained on the quantised base merges "
        "exactly into what dequantize() of transformers' model gives, saved.",
    ),
    "OTHER_QUANTIZATION": Code(
        "The base is stored in a quantisation other than bitsandbytes' 4 and 8 bit: no adapter runs on it here.",
        "Give the unquantised base; with quantization 4bit or 8bit it takes as little memory.",
    ),
    "REPACKED_BASE": Code(
        "bitsandbytes has packed 4-bit layers anew for CPUs: their scales were rounded, and no gradient passes them.",
        "Load the base again, and attach the adapter before the model runs.",
    ),
    "NO_SUCH_MODULE": Code("The base has no tensor for this module.", "Is this the base the adapter was trained on?"),
    "AMBIGUOUS_MODULE": Code(
        "The module's name fits several tensors of the base.", "Rename the modules to the base's full names."
    ),
    "NAME_MATCHED": Code(
        "Names differ from the base's by a prefix, or are those that transformers has for them; each has one place.",
        "Nothing to do.",
    ),
    "STORED_OTHERWISE": Code(
        "The base stores this weight in another form than the model has it: interleaved, or its rows in another order.",
        "Merge with PEFT, which works on the weights as the model has them.",
    ),
    "SHAPE_MISMATCH": Code(
        "The adapter's shape does not fit the base tensor.", "Is this the base the adapter was trained on?"
    ),
    "VOCABULARY_SPLIT": Code(
        "The file holds one side of a resized vocabulary, input embedding or output, and not the other.",
        "Save the adapter again with save_embedding_layers=True, or with both in modules_to_save.",
    ),
    "AMBIGUOUS_ORIENTATION": Code(
        "A square weight, and nothing tells whether the base stores it (out, in) or (in, out).",
        "Give the base with a config.json that names its model_type.",
    ),
    "NORMED_EMBEDDING": Code(
        "The model normalises what it looks up in this embedding, inside the module, and PEFT adds the update after "
        "that: no embedding's weight gives the same.",
        "Serve the adapter unmerged, or train without the embedding.",
    ),
    "GROUPED_CONV": Code("The base convolution is grouped; its update is not one product.", "PEFT refuses it too."),
    "UNKNOWN_TIE": Code(
        "The input embedding is tied to an output whose name is not known for this architecture.",
        "Untie the base (save it with tie_word_embeddings=false) and merge again.",
    ),
    "NEVER_CALLED": Code(
        "An encoder-decoder's `shared` embedding is adapted, but transformers 5 never calls that module: it reads the "
        "tied encoder and decoder embeddings, which this adapter leaves as they are.",
        "If it was trained with transformers 4, where `shared` was the input embedding, rename the module.",
    ),
    "ZERO_NORM": Code(
        "A vector of the adapted weight has length zero, so its direction is undefined.",
        "The base or the adapter is not the one that was trained.",
    ),
    "TIE_BROKEN_BY_FILE": Code(
        "ensure_weight_tying is set, but the two tied adapters in the file differ.",
        "Correct ensure_weight_tying, or save the adapter again.",
    ),
    # Attaching and training.
    "TARGETS_UNMATCHED": Code(
        "A target names no module of the model, or one that is not a linear layer.",
        "Correct the targets; the layers there are stand beside it.",
    ),
    "RANK_TOO_HIGH": Code(
        "The rank is larger than the smaller side of a layer's weight, so part of it could learn nothing.",
        "Choose a lower rank, or leave the layer out of the targets.",
    ),
    "UNATTACHABLE": Code(
        "The file holds more than adapters of linear layers, and a live model would go on without it.",
        "Merge it into the base instead.",
    ),
    "PEFT_RELEASE": Code(
        "The plug-in adds to lists inside PEFT, which another release may keep elsewhere.",
        "Install a PEFT release of the tested range.",
    ),
    "LOSS_NOT_FINITE": Code(
        "The loss or a trained tensor became NaN or infinite, so training stopped.",
        "Lower the learning rate or the scaling, or train in bf16 or fp32; the last checkpoint, where there is one, is "
        "whole and loads as an adapter.",
    ),
    "NO_DATASETS": Code(
        "Tables (.parquet, .csv, .arrow) and datasets of the hub are read by the Python package datasets.",
        "Run `pip install 'd2surgery[data]'`, or give JSON or JSON lines.",
    ),
    "NO_TRAINER": Code(
        "Training uses transformers' Trainer, and a package it needs is missing.",
        "Run `pip install 'd2surgery[train]'`.",
    ),
    "REPORTER_FAILED": Code(
        "A service that training reports to could not be used, as its own package says.",
        "Log in or work offline as its package documents (WANDB_MODE=offline), or leave it out of report_to.",
    ),
    "NO_BITSANDBYTES": Code(
        "Bases in 4 and 8 bit are held by bitsandbytes, an extra that is not installed.",
        "Run `pip install 'd2surgery[quantized]'`.",
    ),
    "NO_GGUF": Code(
        "The blocks of a quantised GGUF file are read by the Python package gguf, an extra that is not installed.",
        "Run `pip install 'd2surgery[gguf]'`.",
    ),
    # Merging.
    "STRENGTH": Code(
        "There is no such strength: it is finite, and replaced weights and rows have none but 1.",
        "Merge with --strength 1, or without what is replaced.",
    ),
    "OUTPUT_EXISTS": Code("There is something at the output path.", "Remove it or choose another path."),
    "OTHER_SYSTEM": Code(
        "This operating system lacks what the verb needs; reading, measuring, converting and reports need none of it.",
        "Merge on Linux or macOS; on Windows in WSL.",
    ),
    "OUTPUT_IN_USE": Code(
        "Another process writes to this output; one at a time does.",
        "Let it finish, or end it and continue with --resume.",
    ),
    "RESUME_MISMATCH": Code(
        "What is unfinished at this path, a merge or a training, was made from other inputs, options or versions, or, "
        "where arithmetic differs, on another processor or with another linear-algebra library.",
        "Give the same again, or remove what is there (a merge's .partial directory) and begin anew.",
    ),
    "DAMAGED_CHECKPOINT": Code(
        "A file of the checkpoint to resume from is missing or cut short.",
        "Remove that checkpoint's directory: --resume goes on from the one before it, or begins again.",
    ),
    "BASE_CHANGED": Code(
        "A file of the base was written to, replaced or removed after it was first read: the merge would be of two.",
        "Remove the .partial directory and merge again when nothing writes to the base.",
    ),
    "ADAPTER_CHANGED": Code(
        "A file of the adapter was written to, replaced or removed after it was first read: the merge would be of two.",
        "Remove the .partial directory and merge again when nothing writes to the adapter.",
    ),
    "COMPANION_CHANGED": Code(
        "A file that is copied beside the merged weights was written to, replaced or removed meanwhile.",
        "Continue with --resume when nothing writes to it.",
    ),
    "DISK_FULL": Code("There is not enough space on the disk.", "Free space and run again with --resume."),
    "MEMORY": Code("The merge needs more memory than --max-memory allows.", "Raise --max-memory."),
    "OTHER_BASE_NAMED": Code(
        "The adapter's config names another base than the one given. Another size, version or tuning has weights "
        "of its own, and what was learnt does not fit them even where every shape does.",
        "Give the base that the config names, or see that the given one is the same under another name.",
    ),
    # Questions, answers and prompts.
    "BAD_DATA": Code(
        "A file of items or prompts is empty, damaged, or holds items that cannot be used.",
        'Give {"instruction", "output", "answer"} or {"question", "answer", "choices"} objects, as a JSON list or one '
        "per line.",
    ),
    "ITEMS_TOO_LONG": Code(
        "Items of the data are longer than a row.", "Raise max_length if the beginnings of those questions matter."
    ),
    "IDLE_DEVICES": Code(
        "One process trains on one device, and there are more.",
        "Start a process per device: torchrun --nproc-per-node N -m d2surgery train …, or accelerate launch.",
    ),
    "START_MOVES_BASE": Code(
        "Dual LoRA starts from a random delta, which is not small beside the base once its scaling has risen.",
        "Leave sigma out (the start is then 1 % of the base), or make it smaller: the delta grows with its square.",
    ),
    "NO_DOUBLE_PRECISION": Code(
        "The device has no float64, in which norms and signs are computed here.",
        "Use the CPU, or a GPU of CUDA's kind.",
    ),
    # Audit.
    "BAD_MERGED": Code(
        "The directory given as merged does not hold a merged checkpoint.",
        "Give the directory that merging wrote; where it holds no safetensors, load the model and save it as such.",
    ),
    "NO_RECEIPT": Code(
        "The merged directory has no d2surgery_merge.json with hashes.", "Audit by the weights, without --receipt."
    ),
    "WRONG_ADAPTER": Code("The receipt names an adapter with other tensors.", "Give the adapter that was merged."),
    "DELTA_NOT_APPLIED": Code(
        "Adapted weights are those of the base: the adapter was not merged there.",
        "Merge again; see that the merger loads the adapter and activates it.",
    ),
    "PARTIAL_MERGE": Code(
        "Some adapted modules were merged and others were left as in the base; or so were some rows or columns of one, "
        "or they hold the delta at another strength than the rest.",
        "Merge again, and compare the merger's list of modules, and of shards, with the adapter's.",
    ),
    "DELTA_APPLIED_TWICE": Code(
        "The adapter was added two times.", "Merge once, onto the base as it was before any merge."
    ),
    "SIGN_FLIPPED": Code(
        "The delta was subtracted.", "Add it; or, where base and merged were given in the other order, turn them."
    ),
    "WRONG_STRENGTH": Code(
        "The delta was applied with another factor than the adapter's scaling.",
        "See how the merger gets its scaling: alpha/r, or alpha/√r with use_rslora, per module with patterns.",
    ),
    "STRENGTH_OF_A_PART": Code(
        "The strength scaled a part of the adapter instead of its delta: the update before the norm, as PEFT and "
        "diffusers do, or the gain of the magnitude, as LyCORIS does.",
        "Merge here with --strength, which scales the whole change, or audit at the strength 1.",
    ),
    "ON_A_GRID": Code(
        "Merged weights are quantised, and consistent with a right merge as far as their grid shows: its noise hides "
        "the bits, and a small delta.",
        "Audit the unquantised merge. Of Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 and MLX's a merge by a known merger can be made "
        "again block by block; more modules, or a finer grid, narrow the strength.",
    ),
    "SAME_BLOCKS": Code(
        "Merged weights are quantised, and a known merge, quantised, gives the same blocks.", "Nothing to do."
    ),
    "STRENGTH_UNCERTAIN": Code(
        "The strength can neither be confirmed nor refuted: its deviation is small or its standard error large.",
        "Merge again with a known merger, or compare outputs (--level logits).",
    ),
    "TENSOR_CHANGED": Code(
        "A tensor that the adapter leaves alone differs from the base.",
        "Find out what wrote it; a merge copies what no adapter touches bit for bit.",
    ),
    "WRONG_NAMES": Code(
        "Tensors are there under names that transformers does not know: it leaves them unread and starts the weights "
        "that it lacks at random.",
        "Save the model itself, not the one that wraps it: unwrap it from DistributedDataParallel, torch.compile, an "
        "exponential moving average or PEFT first, then save_pretrained.",
    ),
    "ADAPTER_BESIDE": Code(
        "An adapter lies beside the merged weights. With its adapter_config.json transformers applies it again on "
        "loading, on top of weights that hold it already.",
        "Move the adapter's files out of the merged directory.",
    ),
    "CANNOT_LOAD": Code(
        "transformers does not load these weights from this directory, whatever they hold.",
        "Name the files model.safetensors, or model-….safetensors with a model.safetensors.index.json that has "
        "`metadata` and `weight_map`; save_pretrained does.",
    ),
    "NEAREST_ADAPTER": Code(
        "Several adapters were given. The one was audited whose merge the merged weights are nearest to.",
        "The verdict is about this one: where it fails, none of the adapters was merged as it should be.",
    ),
    "OTHER_RECEIPT": Code(
        "The receipt in the merged directory is of another merge: of another base, adapter or strength, or of weights "
        "that were changed since. The weights decide the verdict, not the receipt.",
        "Remove d2surgery_merge.json, or merge again.",
    ),
    "TENSOR_MISSING": Code("A tensor of the base is not in the merged checkpoint.", "Save the merged model again."),
    "TENSOR_EXTRA": Code(
        "The merged checkpoint holds a tensor that neither base nor adapter explains.", "Find out what wrote it."
    ),
    "TENSOR_RESIZED": Code(
        "A tensor has another shape than base and adapter give it.", "See whether the vocabulary was resized."
    ),
    "REQUANTIZED": Code(
        "The merged weights lie on a coarser grid than their dtype: they were quantised.",
        "Audit the unquantised merge, and quantise it once afterwards.",
    ),
    "BITS_CUT_OFF": Code(
        "The delta is there, and every value is rounded toward zero: lower bits were cut off, not rounded.",
        "Round to nearest where 32 bits become 16, as torch does; all values are a little too small now.",
    ),
    "OTHER_ROUNDING": Code(
        "No known recipe gives every bit, and the differences are within rounding: merged with another library or on "
        "another processor, or, where it is a few elements and all else is replayed, touched afterwards.",
        "Nothing to do, unless every bit matters: --exact makes it a failure.",
    ),
    "LOW_SURVIVAL": Code(
        "A right merge, but rounding to this dtype lost part of a small delta.",
        "Store the merged checkpoint in float32 if that part matters, or serve the adapter unmerged.",
    ),
    # What models say.
    "LAYER_DIFFERS": Code(
        "The output of a module differs from that of base and adapter by more than rounding explains.",
        "Look at this module's weights: the audit of weights says what is wrong with them.",
    ),
    "LOGITS_DIFFER": Code(
        "The merged model's next-token distributions differ from those of base and adapter by more than noise.",
        "Look at the first module that differs, and at the audit of weights.",
    ),
    "NOT_RUNNABLE": Code(
        "transformers cannot build, fill or run this model here.",
        "Check that the directory is whole and that this version of transformers knows the architecture.",
    ),
    "ROUNDING_EXCESS": Code(
        "The delta is there at the right strength, with more noise than rounding once makes.",
        "Merge in float32 and round once; norms and magnitudes in 16 bits cost most.",
    ),
    "ROW_SCALED": Code(
        "Rows of an adapted weight are scaled, and the rest is the right merge.",
        "Find out what wrote them: a merge scales no row by itself; rescaling for quantisation does.",
    ),
    "COLUMN_SCALED": Code(
        "Columns of an adapted weight are scaled, and the rest is the right merge.",
        "Find out what wrote them: smoothing for quantisation moves scales between columns and norms.",
    ),
    "WEIGHT_DECAYED": Code(
        "The whole of an adapted weight is multiplied by a number near one.",
        "Merge again: weight decay, averaging with another model or a rescaling touched base and delta alike.",
    ),
    "VALUES_SHIFTED": Code(
        "A constant was added to an adapted weight, or to rows or columns of it.", "Merge again, and see what wrote it."
    ),
    "LARGEST_CHANGED": Code(
        "The largest elements of an adapted weight, or the smallest, are not those of the right merge.",
        "See whether outliers were clipped or small values pruned; merge again.",
    ),
    "MAGNITUDE_LOST": Code(
        "Rows of a DoRA weight were merged without their trained magnitude, or with another's.",
        "Merge with every magnitude of the adapter, in the adapter's order of rows.",
    ),
    "ZEROED": Code(
        "Elements of an adapted weight were set to zero: pruned, or never written.",
        "Audit the dense merge, and prune it afterwards.",
    ),
    "ANOTHER_ADAPTER": Code(
        "Another adapter was merged: another checkpoint of the run, another seed, or a twin on other data.",
        "Give the adapter that was merged; several candidates may be given, and the audit says which one it is.",
    ),
    "WRONG_BASE": Code(
        "The merged checkpoint was made from another base: also tensors without an adapter differ, or what is left has "
        "full rank.",
        "Give the base that was merged into, in its own revision.",
    ),
    "DELTA_TRANSPOSED": Code("The update was added transposed.", "See fan_in_fan_out, and the order of the factors."),
    "MAGNITUDE_DROPPED": Code(
        "DoRA was merged without its magnitude or its norm.", "Use a merger that knows DoRA (use_dora)."
    ),
    "WRONG_AXIS": Code(
        "Norms were taken along the other axis.", "See `along`; PEFT's DoRA keeps out_features (norm over dim 1)."
    ),
    "BRANCH_MISSING": Code("Part of the adapter was left out.", "Merge again with every factor of the adapter."),
    "PROJECTION_MISSING": Code(
        "D2-LoRA was merged in another form: without the directional projection, or without the update after it.",
        "The form stands in the adapter's config; Ŵ = W* + ΔW by default.",
    ),
    "DIRECTION_MISSING": Code(
        "Dual LoRA was merged without its direction group, or with another sign at zero.",
        "W' = W0 + s·ReLU(BA) ⊙ sign(DC), sign +1 for positive values and −1 otherwise.",
    ),
    "HEADS_PERMUTED": Code(
        "Rows of a query or key weight are in another order within each head: the two layouts of rotary embeddings.",
        "Convert base and adapter by the same permutation, or neither.",
    ),
    "ROWS_PERMUTED": Code(
        "Rows of a fused weight are in another order: query, key and value one after the other or by groups of heads, "
        "gate and up as halves, interleaved or exchanged.",
        "Convert base and adapter by the same permutation, or neither.",
    ),
    "DELTA_MISPLACED": Code(
        "The delta of another module, layer or expert was merged here.",
        "See how the merger maps names: experts and layers by number (as text, 10 comes before 2), gate and up.",
    ),
    "EXPERT_LAYOUT": Code(
        "The experts' columns of lora_B were read in the other order: interleaved as PEFT packs them, or grouped by "
        "expert as unsloth did before 17 September 2026.",
        "Find out what trained the adapter; audit it with the other --expert-layout, or merge it again.",
    ),
    "DELTA_UNEXPLAINED": Code(
        "An adapted tensor differs from the right merge and no known fault explains how.",
        "Merge again; check that base, adapter and merged belong together.",
    ),
    "BIAS_FORGOTTEN": Code("A trained bias was not merged.", "Merge with the biases of the adapter file."),
    "REPLACEMENT_FORGOTTEN": Code(
        "A saved module or trained token rows are still those of the base.",
        "Merge with modules_to_save and trainable_token_indices.",
    ),
    "TIE_DOUBLED": Code(
        "Two tied sides share one tensor in the merged checkpoint although the adapter makes them differ: it was "
        "patched on behalf of both, or one side's update reached the other.",
        "Untie: write both sides and set tie_word_embeddings to false.",
    ),
    "CONFIG_CHANGED": Code(
        "A config beside the merged weights differs from what merging writes.", "Copy the base's file, or see why."
    ),
    "TOKENIZER_TAKEN": Code(
        "A tokenizer or chat template lies beside the adapter and is not the base's. Whoever trained the adapter meant "
        "it, so merging takes it.",
        "Nothing to do; --tokenizer base keeps the base's.",
    ),
    "TOKENS_WITHOUT_ROWS": Code(
        "The adapter's tokenizer gives ids for which the merged embedding has no rows: a text with one of these tokens "
        "would end in an error. Whoever trained the adapter may have resized the embedding and not saved it.",
        "Get the adapter with its embedding (PEFT: save_embedding_layers=True), or merge with --tokenizer base.",
    ),
    "TOKENIZER_CHANGED": Code(
        "The tokenizer differs from the one that belongs to the base or adapter, or is missing.",
        "Copy its files into the merged directory.",
    ),
    "TASK_GAP": Code(
        "Base with adapter and the merged model answer questions with different accuracy, or too few were asked.",
        "Look at the first module that differs; ask more questions where the note says how many.",
    ),
    "NO_HARNESS": Code(
        "The lm-eval harness is an extra that is not installed.", "Run `pip install 'd2surgery[harness]'`."
    ),
    # Figures.
    "NO_IMAGES": Code(
        "PNG and SVG images are drawn by kaleido with Chrome or Chromium, and one of them is missing or failed.",
        "Run `pip install 'd2surgery[images]'` and install Chromium, or give a file name that ends in .html.",
    ),
    "USAGE": Code("The arguments do not fit together.", "See --help."),
}
