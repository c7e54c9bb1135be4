//! The 64-bit FNV-1a hash, the same in every daemon: it spreads what would otherwise happen at the same instant
//! (<http://www.isthe.com/chongo/tech/comp/fnv/>).

pub(crate) fn fnv1a(text: &str) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in text.bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    // The callers use the low bits alone: mix the high ones in.
    hash ^ (hash >> 32)
}
