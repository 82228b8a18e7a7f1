auto_scale_lr = dict(base_batch_size=4, enable=False)
camvid = dict(
    data_root='data/camvid',
    img_suffix='.jpg',
    metainfo=dict(
        classes=(
            'sky',
            'building',
            'pole',
            'road',
            'pavement',
            'tree',
            'sign',
            'fence',
            'car',
            'pedestrian',
            'bicyclist',
        ),
        palette=[
            [
                128,
                128,
                128,
            ],
            [
                128,
                0,
                0,
            ],
            [
                192,
                192,
                128,
            ],
            [
                128,
                64,
                128,
            ],
            [
                60,
                40,
                222,
            ],
            [
                128,
                128,
                0,
            ],
            [
                192,
                128,
                128,
            ],
            [
                64,
                64,
                128,
            ],
            [
                64,
                0,
                128,
            ],
            [
                64,
                64,
                0,
            ],
            [
                0,
                128,
                192,
            ],
        ]),
    seg_map_suffix='.png',
    type='BaseSegDataset')
custom_imports = dict(
    allow_failed_imports=False,
    imports=[
        'dense.backbone',
        'dense.segmentor',
    ])
default_hooks = dict(
    checkpoint=dict(by_epoch=False, interval=800, type='CheckpointHook'),
    logger=dict(interval=50, log_metric_by_epoch=False, type='LoggerHook'),
    param_scheduler=dict(type='ParamSchedulerHook'),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    timer=dict(type='IterTimerHook'),
    visualization=dict(type='SegVisualizationHook'))
default_scope = 'mmseg'
env_cfg = dict(
    cudnn_benchmark=True,
    dist_cfg=dict(backend='gloo'),
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0))
launcher = 'none'
load_from = None
log_level = 'INFO'
log_processor = dict(by_epoch=False)
model = dict(
    backbone=dict(
        drop_path_rate=0.0,
        pad='mask',
        pretrained=None,
        type='TwinsBackbone',
        variant='alt_gvt_small'),
    data_preprocessor=dict(
        bgr_to_rgb=True,
        mean=[
            123.675,
            116.28,
            103.53,
        ],
        pad_val=0,
        seg_pad_val=255,
        size=(
            128,
            128,
        ),
        std=[
            58.395,
            57.12,
            57.375,
        ],
        type='SegDataPreProcessor'),
    decode_head=dict(
        align_corners=False,
        channels=128,
        dropout_ratio=0.1,
        feature_strides=[
            4,
            8,
            16,
            32,
        ],
        in_channels=[
            256,
            256,
            256,
            256,
        ],
        in_index=[
            0,
            1,
            2,
            3,
        ],
        loss_decode=dict(
            avg_non_ignore=False,
            loss_weight=1.0,
            type='CrossEntropyLoss',
            use_sigmoid=False),
        norm_cfg=dict(requires_grad=True, type='SyncBN'),
        num_classes=11,
        type='FPNHead'),
    neck=dict(
        in_channels=[
            64,
            128,
            256,
            512,
        ],
        num_outs=4,
        out_channels=256,
        type='FPN'),
    test_cfg=dict(mode='whole'),
    train_cfg=dict(),
    type='TwinsSegmentor')
model_wrapper_cfg = dict(
    broadcast_buffers=False, device_ids=None, type='MMDistributedDataParallel')
norm_cfg = dict(requires_grad=True, type='SyncBN')
optim_wrapper = dict(
    optimizer=dict(lr=0.0004, type='AdamW', weight_decay=0.01),
    type='OptimWrapper')
param_scheduler = [
    dict(
        begin=0, by_epoch=False, end=101, start_factor=1e-06, type='LinearLR'),
    dict(
        begin=0,
        by_epoch=False,
        end=2401,
        eta_min=0.0,
        power=0.9,
        type='PolyLR'),
]
part = dict(
    backbone=dict(
        drop_path_rate=0.0, pretrained=None, variant='alt_gvt_small'),
    neck=dict(in_channels=[
        64,
        128,
        256,
        512,
    ]))
randomness = dict(deterministic=False, seed=0)
resume = False
scale = (
    320,
    240,
)
test_cfg = None
test_dataloader = None
test_evaluator = None
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(keep_ratio=True, scale=(
        320,
        240,
    ), type='Resize'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_cfg = dict(max_iters=2400, type='IterBasedTrainLoop', val_interval=800)
train_dataloader = dict(
    batch_size=4,
    dataset=dict(
        data_prefix=dict(
            img_path='images/training', seg_map_path='annotations/training'),
        data_root='data/camvid',
        img_suffix='.jpg',
        metainfo=dict(
            classes=(
                'sky',
                'building',
                'pole',
                'road',
                'pavement',
                'tree',
                'sign',
                'fence',
                'car',
                'pedestrian',
                'bicyclist',
            ),
            palette=[
                [
                    128,
                    128,
                    128,
                ],
                [
                    128,
                    0,
                    0,
                ],
                [
                    192,
                    192,
                    128,
                ],
                [
                    128,
                    64,
                    128,
                ],
                [
                    60,
                    40,
                    222,
                ],
                [
                    128,
                    128,
                    0,
                ],
                [
                    192,
                    128,
                    128,
                ],
                [
                    64,
                    64,
                    128,
                ],
                [
                    64,
                    0,
                    128,
                ],
                [
                    64,
                    64,
                    0,
                ],
                [
                    0,
                    128,
                    192,
                ],
            ]),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations'),
            dict(
                keep_ratio=True,
                ratio_range=(
                    0.75,
                    1.5,
                ),
                scale=(
                    320,
                    240,
                ),
                type='RandomResize'),
            dict(
                cat_max_ratio=0.75, crop_size=(
                    128,
                    128,
                ), type='RandomCrop'),
            dict(prob=0.5, type='RandomFlip'),
            dict(type='PhotoMetricDistortion'),
            dict(type='PackSegInputs'),
        ],
        seg_map_suffix='.png',
        type='BaseSegDataset'),
    num_workers=1,
    persistent_workers=True,
    sampler=dict(shuffle=True, type='InfiniteSampler'))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(
        keep_ratio=True,
        ratio_range=(
            0.75,
            1.5,
        ),
        scale=(
            320,
            240,
        ),
        type='RandomResize'),
    dict(cat_max_ratio=0.75, crop_size=(
        128,
        128,
    ), type='RandomCrop'),
    dict(prob=0.5, type='RandomFlip'),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
val_cfg = dict(type='ValLoop')
val_dataloader = dict(
    batch_size=1,
    dataset=dict(
        data_prefix=dict(
            img_path='images/validation',
            seg_map_path='annotations/validation'),
        data_root='data/camvid',
        img_suffix='.jpg',
        metainfo=dict(
            classes=(
                'sky',
                'building',
                'pole',
                'road',
                'pavement',
                'tree',
                'sign',
                'fence',
                'car',
                'pedestrian',
                'bicyclist',
            ),
            palette=[
                [
                    128,
                    128,
                    128,
                ],
                [
                    128,
                    0,
                    0,
                ],
                [
                    192,
                    192,
                    128,
                ],
                [
                    128,
                    64,
                    128,
                ],
                [
                    60,
                    40,
                    222,
                ],
                [
                    128,
                    128,
                    0,
                ],
                [
                    192,
                    128,
                    128,
                ],
                [
                    64,
                    64,
                    128,
                ],
                [
                    64,
                    0,
                    128,
                ],
                [
                    64,
                    64,
                    0,
                ],
                [
                    0,
                    128,
                    192,
                ],
            ]),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(keep_ratio=True, scale=(
                320,
                240,
            ), type='Resize'),
            dict(type='LoadAnnotations'),
            dict(type='PackSegInputs'),
        ],
        seg_map_suffix='.png',
        type='BaseSegDataset'),
    num_workers=1,
    persistent_workers=True,
    sampler=dict(shuffle=False, type='DefaultSampler'))
val_evaluator = dict(
    iou_metrics=[
        'mIoU',
    ], type='IoUMetric')
visualizer = dict(
    name='visualizer',
    type='SegLocalVisualizer',
    vis_backends=[
        dict(type='LocalVisBackend'),
    ])
work_dir = 'work_dirs/fpn_alt_gvt_s_128x128_camvid'
