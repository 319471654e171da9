"""What is known of the calls of the table for NPUs: which kernels of CANN they get to, and what costs time there.

The tests of `test_wheel.py` hold it against torch_npu, and docs/npu.md is drawn from it.
"""

KERNELS_OF_CANN = {
    "npu_fusion_attention": "aclnnFlashAttentionVarLenScoreV4",
    "npu_fusion_attention_grad": "aclnnFlashAttentionUnpaddingScoreGradV4",
    "npu_rms_norm": "aclnnRmsNorm",
    "npu_rms_norm_backward": "aclnnRmsNormGrad",
    "npu_rotary_mul": "aclnnRotaryPositionEmbeddingV2",
    "npu_swiglu": "aclnnSwiGlu",
    "npu_swiglu_backward": "aclnnSwiGluGrad",
    "npu_gelu": "aclnnGeluV2",
    "npu_gelu_backward": "aclnnGeluBackwardV2",
    "npu_moe_token_permute": "aclnnMoeTokenPermute",
    "npu_moe_token_permute_grad_v2": "aclnnMoeTokenPermuteGrad",
    "_npu_moe_token_unpermute": "aclnnMoeTokenUnpermute",
    "npu_moe_token_unpermute_grad_v2": "aclnnMoeTokenUnpermuteGrad",
    "npu_grouped_matmul": "aclnnGroupedMatmulV5",
    "npu_alltoallv_gmm": "aclnnAlltoAllvGroupedMatMul",
    "npu_gmm_alltoallv": "aclnnGroupedMatMulAlltoAllv",
}
"""Operators that a step calls, and where each gets."""

READS = {
    "aten::_to_copy in parallel/transforms/expert_parallel.py:_read": "rows to exchange, once per dropless layer",
    "aten::_to_copy in parallel/transforms/expert_parallel.py:_host_copy": "the same beside selective remat",
    "aten::_to_copy in train/objective.py:weigh_by": "label counts of all ranks, once per step",
    "aten::_to_copy in train/objective.py:weighed": "numbers of labels; a run counts them before a batch is moved",
}
"""Where the host waits for the device within a step."""

SINGLE = {"npu_fusion_attention_v3": "aclnnFlashAttentionVarLenScoreV4"}
"""Operators that no step calls by default, and where a single call gets."""
