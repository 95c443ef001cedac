"""Nets of packages outside timm and torchvision, as the packages make them, with random weights.

An entry makes one net and an example input as small as the net takes. A package is imported when one
of its nets is made, so a missing one costs its own rows only. ``pip install '.[others]'`` brings
most of them; pyproject.toml says which need ``--no-deps``.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["OTHERS", "build_other"]


class Lazy:
    """A module that is imported when one of its names is asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._name), name)


def x(*shape: int) -> torch.Tensor:
    return torch.rand(1, *shape)


def image(size: int = 64, channels: int = 3) -> torch.Tensor:
    return x(channels, size, size)


def each(names: str, make: Callable[[str], Any]) -> dict[str, Callable[[], Any]]:
    """Return an entry for each name."""
    return {name: lambda name=name: make(name) for name in names.split()}


def hf(model: str, example: Any, **config: Any) -> Any:
    made = getattr(Lazy("transformers"), model)
    return made(made.config_class(**config)), example


def smp(name: str) -> Any:
    arch, _, encoder = name.partition("/")
    made = getattr(Lazy("segmentation_models_pytorch"), arch)
    return made(encoder, encoder_weights=None), image(128 if arch == "PAN" else 64)


def spandrel(path: str, example: Any = None, **kwargs: Any) -> Any:
    folder, file, name = path.split(".")
    made = getattr(Lazy(f"spandrel.architectures.{folder}.__arch.{file}"), name)
    return made(**kwargs), image(32) if example is None else example


def cv(example: Any) -> Callable[[str], Any]:
    return lambda name: (Lazy("pytorchcv.model_provider").get_model(name), example)


def super_image(name: str, **config: Any) -> Any:
    package = Lazy("super_image")
    return getattr(package, f"{name}Model")(getattr(package, f"{name}Config")(scale=2, **config))


def detr() -> Any:
    t = Lazy("transformers")
    backbone = t.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[2, 2, 2, 2], layer_type="basic",
        out_features=["stage4"],
    )  # fmt: skip
    config = t.DetrConfig(
        use_timm_backbone=False, backbone=None, backbone_config=backbone, d_model=32,
        encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=8,
    )  # fmt: skip
    return t.DetrForObjectDetection(config), image(96)


def dyn_unet(dims: int, **kwargs: Any) -> Any:
    net = monai.DynUNet(
        dims, 1, 2, [3] * 4, [1, 2, 2, 2], [2, 2, 2], filters=[8, 16, 32, 32], **kwargs
    )
    return net, x(1, *[32] * dims)


def nnunet(kind: str, dims: int, conv: Any, norm: Any, **blocks: Any) -> Any:
    made = getattr(Lazy("dynamic_network_architectures.architectures.unet"), kind)
    net = made(
        1, 4, [8, 16, 32, 32], conv, 3, [1, 2, 2, 2], num_classes=2, n_conv_per_stage_decoder=2,
        conv_bias=True, norm_op=norm, norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True}, deep_supervision=False, **blocks,
    )  # fmt: skip
    return net, x(1, *[32] * dims)


def sb(path: str, example: Any, *args: Any, **kwargs: Any) -> Any:
    module, _, name = path.partition(".")
    return getattr(Lazy(f"speechbrain.lobes.models.{module}"), name)(*args, **kwargs), example


monai = Lazy("monai.networks.nets")
diffusers = Lazy("diffusers")
audio = Lazy("torchaudio.models")
tsai = Lazy("tsai.models.all")
eeg = Lazy("braindecode.models")
kornia = Lazy("kornia.feature")
series = x(3, 128)
EEG = {"n_chans": 8, "n_outputs": 4, "n_times": 512, "sfreq": 128}

OTHERS: dict[str, dict[str, Callable[[], Any]]] = {
    "ultralytics": {
        **each(
            "yolov3-tiny yolov5n yolov6n yolov8n yolov8n-ghost yolov9t yolov10n yolo11n yolo12n yolo26n",
            lambda n: (Lazy("ultralytics.nn.tasks").DetectionModel(f"{n}.yaml", verbose=False), image(64)),
        ),
        **each(
            "yolov8n-seg yolo11n-seg",
            lambda n: (Lazy("ultralytics.nn.tasks").SegmentationModel(f"{n}.yaml", verbose=False), image(64)),
        ),
        "yolo11n-pose": lambda: (Lazy("ultralytics.nn.tasks").PoseModel("yolo11n-pose.yaml", verbose=False), image(64)),
        "yolo11n-obb": lambda: (Lazy("ultralytics.nn.tasks").OBBModel("yolo11n-obb.yaml", verbose=False), image(64)),
        **each(
            "yolov8n-cls yolo26n-cls",
            lambda n: (Lazy("ultralytics.nn.tasks").ClassificationModel(f"{n}.yaml", verbose=False), image(64)),
        ),
    },
    "segmentation_models_pytorch": each(
        "Unet/resnet18 UnetPlusPlus/resnet18 FPN/resnet34 DeepLabV3/resnet18 DeepLabV3Plus/mobilenet_v2 "
        "Linknet/efficientnet-b0 PSPNet/resnet34 MAnet/resnet18 PAN/resnet34 UPerNet/timm-regnetx_002 "
        "Segformer/mit_b0 Unet/densenet121 Unet/mobileone_s0",
        smp,
    ),
    "monai": {
        "UNet": lambda: (monai.UNet(2, 1, 2, (8, 16, 32), (2, 2), num_res_units=2), x(1, 32, 32)),
        "UNet-3d": lambda: (monai.UNet(3, 1, 2, (8, 16, 32), (2, 2), num_res_units=2), x(1, 16, 16, 16)),
        "DynUNet": lambda: dyn_unet(2, res_block=True),
        "DynUNet-3d": lambda: dyn_unet(3),
        "SegResNet": lambda: (monai.SegResNet(2, 8, 1, 2), x(1, 32, 32)),
        "DenseNet121": lambda: (monai.DenseNet121(2, 1, 2), x(1, 64, 64)),
        "AttentionUnet": lambda: (monai.AttentionUnet(2, 1, 2, (8, 16, 32), (2, 2)), x(1, 32, 32)),
        "BasicUNet": lambda: (monai.BasicUNet(2, 1, 2, (8, 8, 16, 32, 32, 8)), x(1, 32, 32)),
        "VNet": lambda: (monai.VNet(2, 1, 1, dropout_dim=2), x(1, 32, 32)),
        "HighResNet": lambda: (monai.HighResNet(3, 1, 2), x(1, 16, 16, 16)),
        "resnet18-3d": lambda: (monai.resnet18(spatial_dims=3, n_input_channels=1, num_classes=2), x(1, 32, 32, 32)),
        "FlexibleUNet": lambda: (monai.FlexibleUNet(3, 2, "efficientnet-b0"), image(64)),
        "MedNeXtS": lambda: (monai.MedNeXtS(spatial_dims=2, in_channels=1, out_channels=2), x(1, 32, 32)),
        "VQVAE": lambda: (monai.VQVAE(2, 1, 1, (16, 32), 2, (16, 32), [(2, 4, 1, 1)] * 2, [(2, 4, 1, 1, 0)] * 2), x(1, 32, 32)),
        "AutoEncoder": lambda: (monai.AutoEncoder(2, 1, 1, (8, 16), (2, 2), num_res_units=2, inter_channels=[16, 16]), x(1, 32, 32)),
    },
    "transformers": {
        "Segformer": lambda: hf("SegformerForSemanticSegmentation", image(64)),
        "DETR": detr,
        "ResNet": lambda: hf("ResNetForImageClassification", image(64), hidden_sizes=[16, 32, 64, 64], embedding_size=16),
        "ConvNext": lambda: hf("ConvNextForImageClassification", image(64), hidden_sizes=[16, 32, 48, 64], depths=[2, 2, 2, 2]),
        "ConvNextV2": lambda: hf("ConvNextV2ForImageClassification", image(64), hidden_sizes=[16, 32, 48, 64], depths=[2, 2, 2, 2]),
        "RegNet": lambda: hf("RegNetForImageClassification", image(64), hidden_sizes=[32, 64, 64, 128], depths=[2, 2, 3, 1], groups_width=16),
        "EfficientNet": lambda: hf("EfficientNetForImageClassification", image(64), width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280),
        "MobileNetV1": lambda: hf("MobileNetV1ForImageClassification", image(64)),
        "MobileNetV2": lambda: hf("MobileNetV2ForSemanticSegmentation", image(64)),
        "MobileViT": lambda: hf("MobileViTForImageClassification", image(64)),
        "MobileViTV2": lambda: hf("MobileViTV2ForImageClassification", image(64), width_multiplier=0.5),
        "Bit": lambda: hf("BitForImageClassification", image(64), hidden_sizes=[128, 128, 256, 256], depths=[2, 2, 2, 2]),
        "LeViT": lambda: hf("LevitForImageClassification", image(64), image_size=64),
        "CvT": lambda: hf("CvtForImageClassification", image(64), embed_dim=[16, 32, 64], num_heads=[1, 2, 4], depth=[1, 2, 3]),
        "PoolFormer": lambda: hf("PoolFormerForImageClassification", image(64), hidden_sizes=[16, 32, 48, 64]),
        "PvtV2": lambda: hf("PvtV2ForImageClassification", image(64)),
        "Swiftformer": lambda: hf("SwiftFormerForImageClassification", image(64)),
        "Wav2Vec2": lambda: hf("Wav2Vec2Model", x(4000), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, conv_dim=[32] * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2),
        "SEW": lambda: hf("SEWModel", x(4000), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, conv_dim=[16] * 13, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2),
    },
    "diffusers": {
        "UNet2DModel": lambda: (
            diffusers.UNet2DModel(16, block_out_channels=(32, 64), norm_num_groups=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D")),
            (image(16), torch.tensor(3)),
        ),
        "UNet2DConditionModel": lambda: (
            diffusers.UNet2DConditionModel(16, 3, 3, block_out_channels=(32, 64), norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=16),
            (image(16), torch.tensor(3), x(4, 16)),
        ),
        "AutoencoderKL": lambda: (
            diffusers.AutoencoderKL(block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=2, norm_num_groups=8),
            image(32),
        ),
        "VQModel": lambda: (
            diffusers.VQModel(block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8),
            image(32),
        ),
        "AutoencoderTiny": lambda: (diffusers.AutoencoderTiny(), image(32)),
        "UNet1DModel": lambda: (
            diffusers.UNet1DModel(sample_size=64, in_channels=14, out_channels=14, time_embedding_type="positional", extra_in_channels=28, block_out_channels=(28, 32, 64), norm_num_groups=4),
            (x(14, 64), torch.tensor([3])),
        ),
        "AutoencoderOobleck": lambda: (diffusers.AutoencoderOobleck(16, [2, 4], [1, 2], 16, 8, 2), x(2, 256)),
        "AutoencoderDC": lambda: (
            diffusers.AutoencoderDC(latent_channels=8, encoder_block_out_channels=(32, 64), decoder_block_out_channels=(32, 64), encoder_layers_per_block=(2, 2), decoder_layers_per_block=(2, 2), encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ())),
            image(32),
        ),
        "T2IAdapter": lambda: (diffusers.T2IAdapter(channels=[16, 32, 32, 32]), image(64)),
    },
    "pytorchcv": {
        **each(
            "preresnet10 diaresnet10 bam_resnet18 cbam_resnet18 ibn_resnet50 airnet50_1x64d_r16 resattnet56 peleenet dla34 "
            "dicenet_wd2 menet108_8x1_g3 octresnet10_ad2 ghostnet hrnet_w18_small_v1 scnet50 sharesnet18 diracnet18v2 revnet38 fishnet99",
            cv(image(224)),
        ),
        **each(
            "fractalnet_cifar10 shakeshakeresnet20_2x16d_cifar10 ror3_56_cifar10 rir_cifar10 resdropresnet20_cifar10 nin_cifar10",
            cv(image(32)),
        ),
        **each("fastscnn_cityscapes erfnet_cityscapes cgnet_cityscapes", cv(x(3, 64, 128))),
        **each("lffd20x5s320v2_widerface simplepose_resnet18_coco", cv(image(128))),
    },
    "torchaudio": {
        "ConvTasNet": lambda: (audio.ConvTasNet(2, 16, 32, 3, 16, 32, 3, 2), x(1, 800)),
        "Wav2Vec2": lambda: (audio.wav2vec2_model("layer_norm", [(32, 10, 5)] + [(32, 3, 2)] * 4, True, 32, 0.0, 16, 2, 2, 2, 0.0, 32, 0.0, 0.0, True, 0.0, None), x(2000)),
        "WaveRNN": lambda: (audio.WaveRNN([2, 2, 2], 16, 8, 3, 16, 16, 5, 16, 16, 16), (x(1, 48), x(1, 10, 16).mT)),
        "Wav2Letter": lambda: (audio.Wav2Letter(10, "mfcc", 16), x(16, 100)),
        "HDemucs": lambda: (audio.HDemucs(["a", "b"], channels=4), x(2, 16384)),
    },
    "speechbrain": {
        "ECAPA_TDNN": lambda: sb("ECAPA_TDNN.ECAPA_TDNN", x(30, 20), 20, channels=[32] * 4 + [96], attention_channels=16, se_channels=16, res2net_scale=4),
        "CRDNN": lambda: sb("CRDNN.CRDNN", x(30, 20), input_shape=(None, None, 20), cnn_channels=[8, 16], rnn_neurons=16, rnn_layers=1, dnn_neurons=16),
        "Xvector": lambda: sb("Xvector.Xvector", x(30, 20), in_channels=20, tdnn_channels=[32] * 4 + [64], lin_neurons=16),
        "ResNet": lambda: sb("ResNet.ResNet", x(40, 16), 16, channels=[16, 16, 32, 32], block_sizes=[2, 2, 2, 2], lin_neurons=16),
        "ContextNet": lambda: sb("ContextNet.ContextNet", x(30, 20), (None, None, 20), out_channels=32, num_blocks=4, num_layers=3, strides=[1, 2, 1, 2], conv_channels=[16] * 4, residuals=[True] * 4),
        "HifiganGenerator": lambda: sb("HifiGAN.HifiganGenerator", x(20, 16), 20, 1, "1", [[1, 3, 5], [1, 3, 5]], [3, 5], [4, 4], 16, [2, 2]),
        "Cnn14": lambda: sb("Cnn14.Cnn14", x(64, 40), 40, 32),
        "ConvTasNet-mask": lambda: sb("conv_tasnet.MaskNet", x(16, 50), 16, 8, 16, 3, 3, 2, 2),
        "DiffWave": lambda: sb("DiffWave.DiffWave", (x(1, 512), torch.tensor([3]), x(20, 2)), 20, 4, 16, 2, 50),
    },
    "spandrel": {
        "ESRGAN": lambda: spandrel("ESRGAN.RRDB.RRDBNet", num_filters=16, num_blocks=3),
        "RCAN": lambda: spandrel("RCAN.rcan_arch.RCAN", n_resgroups=2, n_resblocks=3, n_feats=16, reduction=4),
        "SPAN": lambda: spandrel("SPAN.span.SPAN", num_in_ch=3, num_out_ch=3, feature_channels=16),
        "Compact": lambda: spandrel("Compact.SRVGG.SRVGGNetCompact", num_feat=16, num_conv=6),
        "SAFMN": lambda: spandrel("SAFMN.safmn.SAFMN", dim=16, n_blocks=3),
        "DnCNN": lambda: spandrel("DnCNN.network_dncnn.DnCNN", in_nc=3, out_nc=3, nc=16, nb=8),
        "FBCNN": lambda: spandrel("FBCNN.FBCNN.FBCNN", nb=1),
        "DRUNet": lambda: spandrel("DRUNet.network_unet.DRUNet", in_nc=3, out_nc=3, nc=[8, 16, 16, 32], nb=2),
        "NAFNet": lambda: spandrel("NAFNet.NAFNet_arch.NAFNet", width=8, middle_blk_num=1, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1]),
        "MixDehazeNet": lambda: spandrel("MixDehazeNet.MixDehazeNet.MixDehazeNet", image(64)),
        "RealPLKSR": lambda: spandrel("PLKSR.RealPLKSR.RealPLKSR", dim=16, n_blocks=4),
        "RealCUGAN": lambda: spandrel("RealCUGAN.upcunet_v3.UpCunet2x", image(48)),
        "SwiftSRGAN": lambda: spandrel("SwiftSRGAN.SwiftSRGAN.Generator", num_channels=16, num_blocks=4),
        "MoSR": lambda: spandrel("MoSR.mosr_arch.MoSR", n_block=4, dim=16),
        "LaMa": lambda: spandrel("LaMa.LaMa.LaMa", (image(32), x(1, 32, 32)), in_nc=4),
        "SCUNet": lambda: spandrel("SCUNet.SCUNet.SCUNet", image(64), config=[1] * 7),
    },
    "tsai": {
        **each("ResNet FCN ResCNN xresnet1d18 XceptionTime InceptionTime TCN", lambda n: (getattr(tsai, n)(3, 4), series)),
        **each("InceptionTimePlus OmniScaleCNN mWDN", lambda n: (getattr(tsai, n)(3, 4, 128), series)),
    },
    "braindecode": each(
        "EEGNet Deep4Net EEGSimpleConv BDTCN EEGInceptionERP SPARCNet ContraWR USleep BrainModule EEGInceptionMI",
        lambda n: (getattr(eeg, n)(**EEG), x(8, 512)),
    ),
    "kornia": {
        "KeyNet": lambda: (kornia.KeyNet(False), x(1, 64, 64)),
        "HardNet": lambda: (kornia.HardNet(False), x(1, 32, 32)),
        "HyNet": lambda: (kornia.HyNet(False), x(1, 32, 32)),
        "SOSNet": lambda: (kornia.SOSNet(False), x(1, 32, 32)),
        "XFeatModel": lambda: (kornia.XFeatModel(), x(1, 64, 64)),
        "DexiNed": lambda: (Lazy("kornia.models.dexined").DexiNed(False), image(64)),
        "RRDBNet": lambda: (Lazy("kornia.models.rrdbnet").RRDBNet(3, 3, 4, 16, 2, 8), image(16)),
    },
    "effdet": each(
        "tf_efficientdet_lite0 efficientdet_q0 resdet50",
        lambda n: (Lazy("effdet").create_model(n, pretrained_backbone=False, image_size=(128, 128)), image(128)),
    ),
    "facenet_pytorch": {
        "InceptionResnetV1": lambda: (Lazy("facenet_pytorch").InceptionResnetV1(), image(96)),
        "ONet": lambda: (Lazy("facenet_pytorch").ONet(False), image(48)),
    },
    "efficientnet_pytorch": each("efficientnet-b0 efficientnet-b1", lambda n: (Lazy("efficientnet_pytorch").EfficientNet.from_name(n), image(64))),
    "efficientnet_lite_pytorch": each("efficientnet-lite0", lambda n: (Lazy("efficientnet_lite_pytorch").EfficientNet.from_name(n), image(64))),
    "pytorch_tcn": {
        "TCN": lambda: (Lazy("pytorch_tcn").TCN(3, [8, 8, 8, 8], use_skip_connections=True), series),
        "TCN-gate": lambda: (Lazy("pytorch_tcn").TCN(3, [8, 8, 8, 8], causal=False, use_norm="batch_norm"), series),
    },
    "dynamic_network_architectures": {
        "PlainConvUNet": lambda: nnunet("PlainConvUNet", 2, nn.Conv2d, nn.InstanceNorm2d, n_conv_per_stage=2),
        "PlainConvUNet-3d": lambda: nnunet("PlainConvUNet", 3, nn.Conv3d, nn.BatchNorm3d, n_conv_per_stage=2),
        "ResidualEncoderUNet": lambda: nnunet("ResidualEncoderUNet", 2, nn.Conv2d, nn.InstanceNorm2d, n_blocks_per_stage=2),
        "ResNetD": lambda: (Lazy("dynamic_network_architectures.architectures.resnet").ResNetD(4), image(64)),
    },
    "pretrainedmodels": each(
        "se_resnet50 dpn68 xception bninception nasnetamobile",
        lambda n: (getattr(Lazy("pretrainedmodels"), n)(pretrained=None), image(224)),
    ),
    "resnest": {"resnest50_fast_1s1x64d": lambda: (Lazy("resnest.torch").resnest50_fast_1s1x64d(), image(64))},
    "open_clip": each("RN50 convnext_base", lambda n: (Lazy("open_clip").create_model(n, pretrained_text=False).visual, image(224))),
    "geffnet": each("mobilenetv3_small_100 efficientnet_lite0 mixnet_s tf_efficientnet_cc_b0_4e fbnetc_100", lambda n: (Lazy("geffnet").create_model(n), image(64))),
    "torchxrayvision": {
        "DenseNet": lambda: (Lazy("torchxrayvision").models.DenseNet(weights=None), x(1, 64, 64)),
        "ResNetAE": lambda: (Lazy("torchxrayvision.autoencoders").ResNetAE50(), x(1, 224, 224)),
    },
    "super_image": {
        **{n: (lambda n=n: (super_image(n), image(24))) for n in ("Edsr", "Msrn", "Mdsr", "Pan", "Carn", "Awsrn", "A2n", "Drln")},
    },
    "demucs": {"HDemucs": lambda: (Lazy("demucs.hdemucs").HDemucs(["a", "b"], channels=4), x(2, 16384))},
    "denoiser": {"Demucs": lambda: (Lazy("denoiser.demucs").Demucs(hidden=8), x(1, 4000))},
    "denoising_diffusion_pytorch": {
        "Unet": lambda: (Lazy("denoising_diffusion_pytorch").Unet(16, dim_mults=(1, 2)), (image(32), torch.tensor([3]))),
    },
    "unet": {
        "UNet2D": lambda: (Lazy("unet").UNet2D(padding=True, residual=True, normalization="batch"), x(1, 32, 32)),
        "UNet3D": lambda: (Lazy("unet").UNet3D(padding=True, num_encoding_blocks=3, out_channels_first_layer=8), x(1, 16, 16, 16)),
    },
    "x_unet": {"XUnet": lambda: (Lazy("x_unet").XUnet(16, dim_mults=(1, 2), num_blocks_per_stage=(2, 2), num_self_attn_per_stage=(0, 1), nested_unet_depths=(1, 1), nested_unet_dim=8), image(32))},
    "torchcrepe": {"Crepe": lambda: (Lazy("torchcrepe").Crepe("tiny"), x(1024))},
}  # fmt: skip


def build_other(name: str) -> tuple[nn.Module, Any]:
    """Return the net ``package:name`` in eval mode, and an example."""
    package, _, net = name.partition(":")
    model, example = OTHERS[package][net]()
    return model.eval(), example
