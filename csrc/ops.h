// The operators, as registration.cpp binds them. Schemas and meaning: fusedres/ops/<op>.py.
#pragma once

#include "view.h"

namespace fusedres {

Tensors2 bn_stats(Tensor x);
Tensors4 bn_act(Tensor x, OptTensor weight, OptTensor bias, OptTensor residual, OptTensor mean,
                OptTensor var, bool batch_stats, double eps, std::string act, bool save_mask);
Tensors4 bn_act_backward(Tensor dy, Tensor x, OptTensor weight, OptTensor bias, OptTensor residual,
                         Tensor mean, Tensor var, Tensor mask, bool batch_stats, double eps,
                         std::string act, bool need_dresidual);

Tensors5 squeeze_excite(Tensor x, Tensor w1, OptTensor b1, Tensor w2, OptTensor b2,
                        OptTensor residual, std::string act, std::string gate, std::string post_act,
                        bool save_mask);
Tensors6 squeeze_excite_backward(Tensor dy, Tensor x, Tensor w1, Tensor w2, OptTensor residual,
                                 Tensor squeezed, Tensor hidden, Tensor logits, Tensor mask,
                                 std::string act, std::string gate, std::string post_act,
                                 bool need_dresidual);

Tensors7 bn_se_act(Tensor x, OptTensor weight, OptTensor bias, Tensor w1, OptTensor b1, Tensor w2,
                   OptTensor b2, OptTensor residual, OptTensor mean, OptTensor var,
                   bool batch_stats, double eps, std::string se_act, std::string gate,
                   std::string act, bool save_mask);
Tensors8 bn_se_act_backward(Tensor dy, Tensor x, OptTensor weight, OptTensor bias, Tensor w1,
                            Tensor w2, OptTensor residual, Tensor mean, Tensor var, Tensor squeezed,
                            Tensor hidden, Tensor logits, Tensor mask, bool batch_stats, double eps,
                            std::string se_act, std::string gate, std::string act,
                            bool need_dresidual);

Tensors4 residual_add(Tensor x, OptTensor weight, OptTensor bias, OptTensor mean, OptTensor var,
                      OptTensor shortcut, OptTensor shortcut_weight, OptTensor shortcut_bias,
                      OptTensor shortcut_mean, OptTensor shortcut_var, OptTensor scale,
                      bool batch_stats, bool shortcut_batch_stats, double eps, double shortcut_eps,
                      std::string act, bool save_mask, bool stats);
Tensors7 residual_add_backward(Tensor dy, OptTensor x, OptTensor weight, OptTensor bias,
                               OptTensor mean, OptTensor var, OptTensor shortcut,
                               OptTensor shortcut_weight, OptTensor shortcut_bias,
                               OptTensor shortcut_mean, OptTensor shortcut_var, OptTensor scale,
                               Tensor mask, bool batch_stats, bool shortcut_batch_stats, double eps,
                               double shortcut_eps, std::string act, bool need_sums,
                               bool need_shortcut_sums, bool need_dshortcut);

Tensors2 residual_mix(Tensor branch, Tensor shortcut, OptTensor gate, OptTensor row_scale,
                      double alpha, double beta, std::string act, bool save_mask);
Tensors3 residual_mix_backward(Tensor dy, OptTensor branch, OptTensor shortcut, OptTensor gate,
                               OptTensor row_scale, Tensor mask, double alpha, double beta,
                               std::string act);

Tensors4 add_norm(Tensor branch, Tensor shortcut, OptTensor weight, OptTensor bias, OptTensor keep,
                  OptTensor row_scale, double scale, double eps, std::string norm);
Tensors4 add_norm_backward(Tensor sum, OptTensor dy, OptTensor dsum, OptTensor weight, Tensor mean,
                           Tensor rstd, OptTensor keep, OptTensor row_scale, double scale,
                           std::string norm);

Tensor highway(Tensor parts, Tensor x, std::string act, bool coupled);
Tensors2 highway_backward(Tensor dy, Tensor parts, Tensor x, std::string act, bool coupled);
Tensors2 lstm_cell(Tensor gates, Tensor c, bool forget_gate);
Tensors2 lstm_cell_backward(Tensor gates, Tensor c, OptTensor dh, OptTensor dc, bool forget_gate);

void dense_store(Tensor buffer, Tensor x, OptTensor mean, OptTensor var, int64_t start);
void dense_load(Tensor h, Tensor buffer, Tensor mean, Tensor var, OptTensor weight, OptTensor bias,
                double eps);
Tensors2 dense_grad(Tensor dbuffer, OptTensor q, OptTensor r, Tensor dh, Tensor buffer, Tensor mean,
                    Tensor var, OptTensor weight, OptTensor bias, double eps);
Tensor dense_finish(Tensor dbuffer, Tensor buffer, Tensor mean, Tensor q, Tensor r, int64_t start,
                    int64_t channels);

int64_t fingerprint(Tensor weight, OptTensor bias, OptTensor bn_weight, OptTensor bn_bias,
                    Tensor mean, Tensor var, bool whole);

int64_t cpu_isa();

}  // namespace fusedres
