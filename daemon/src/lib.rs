//! The library behind `fermatad`, `fermata-shim` and `fermata-plugin-host`.
//!
//! The rooms are listed in the order in which they may import each other: downward only.
#![deny(unsafe_code)]

pub mod shim;
pub mod history;
pub mod plugins;
#[allow(unsafe_code)]
pub mod os;
