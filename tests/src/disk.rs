//! File systems for single tests: small ones that fill up, read-only ones, and one that drops unflushed data like a
//! disk in a power failure.
//!
//! Mounting takes root. Each file system is unmounted when its value is dropped, even if a process still has files
//! open.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statvfs::statvfs;

/// The file that fills a disk. It is not part of a project.
const BALLAST: &str = "ballast";

/// The file system of the state directory.
#[derive(Debug, Default)]
pub(crate) enum Medium {
    /// The file system that the other directories are on.
    #[default]
    Shared,
    /// A tmpfs of this size.
    Small(String),
    /// An ext4 file system in a file.
    File,
}

/// Enough for a consolidation, which requires 64 MiB of free space. The file is sparse.
const DISK_BYTES: u64 = 192 << 20;

impl Medium {
    /// Mounts the file system on the directory, unless it is the shared one.
    pub(crate) fn mount(&self, state: &Path) -> Option<Disk> {
        match self {
            Self::Shared => None,
            Self::Small(size) => Some(Disk::in_memory(state, size)),
            Self::File => Some(Disk::in_file(state, state.with_extension("disk"), DISK_BYTES)),
        }
    }
}

/// A file system that is mounted on a directory.
#[derive(Debug)]
pub struct Disk {
    path: PathBuf,
    image: Option<PathBuf>,
}

impl Disk {
    /// Mounts an empty tmpfs of `size`, in the syntax of its mount option, for instance `24m`.
    ///
    /// # Panics
    /// When it cannot be mounted, like all functions here: the test cannot continue.
    pub fn in_memory(path: impl Into<PathBuf>, size: &str) -> Self {
        let path = path.into();
        let options = format!("size={size},mode=0700");
        mount(Some("tmpfs"), &path, Some("tmpfs"), MsFlags::empty(), Some(options.as_str())).expect("mount");
        Self { path, image: None }
    }

    /// Creates an empty ext4 file system in a file and mounts it. Unflushed data reaches the file after minutes only.
    pub fn in_file(path: impl Into<PathBuf>, image: impl Into<PathBuf>, bytes: u64) -> Self {
        let (path, image) = (path.into(), image.into());
        File::create(&image).and_then(|file| file.set_len(bytes)).expect("make the file of the disk");
        // Lazy initialisation would write in the background.
        run(Command::new("mkfs.ext4").args(["-q", "-E", "lazy_itable_init=0,lazy_journal_init=0"]).arg(&image));
        let disk = Self { path, image: Some(image) };
        disk.attach();
        disk
    }

    fn attach(&self) {
        let image = self.image.as_ref().expect("it lies in a file");
        run(Command::new("mount").args(["-o", "loop,commit=300"]).arg(image).arg(&self.path));
    }

    /// Fills the disk, leaving that many bytes free.
    pub fn fill(&self, leave: u64) {
        self.relieve();
        let free = statvfs(&self.path).expect("query the free space");
        let bytes = (free.blocks_available() * free.fragment_size()).saturating_sub(leave);
        let ballast = File::create(self.path.join(BALLAST)).expect("make the ballast");
        let bytes = i64::try_from(bytes).expect("it is small");
        // If another process writes in the meantime, the disk is full already.
        let filled = if bytes > 0 { nix::fcntl::posix_fallocate(&ballast, 0, bytes) } else { Ok(()) };
        assert!(matches!(filled, Ok(()) | Err(nix::errno::Errno::ENOSPC)), "fill the disk: {filled:?}");
    }

    /// Removes the file that fills the disk.
    pub fn relieve(&self) {
        // The file exists only after `fill`.
        fs::remove_file(self.path.join(BALLAST)).ok();
    }

    /// Simulates a power failure: data that is not flushed at this instant is lost, and the disk is mounted as it
    /// would be after the next boot. All writers must be stopped or ended.
    ///
    /// # Panics
    /// When the file system is not in a file.
    pub fn lose_power(&mut self) {
        let image = self.image.clone().expect("it lies in a file");
        let cut = image.with_extension("cut");
        run(Command::new("cp").arg("--sparse=always").arg(&image).arg(&cut));
        self.detach();
        fs::rename(&cut, &image).expect("put the disk as it was in its place");
        self.attach();
    }

    fn detach(&self) {
        umount2(&self.path, MntFlags::MNT_DETACH).expect("unmount");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.detach();
    }
}

/// A directory that is read-only for every file opened from now on, until this value is dropped.
#[derive(Debug)]
pub struct ReadOnly {
    path: PathBuf,
}

impl ReadOnly {
    /// Mounts the directory over itself, read-only.
    ///
    /// # Panics
    /// When the mount fails.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        let bind = MsFlags::MS_BIND;
        mount(Some(&path), &path, None::<&str>, bind, None::<&str>).expect("cover the directory");
        let read_only = Self { path };
        let flags = bind | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(None::<&str>, &read_only.path, None::<&str>, flags, None::<&str>).expect("make it read-only");
        read_only
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        umount2(&self.path, MntFlags::MNT_DETACH).expect("uncover the directory");
    }
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|e| panic!("start {command:?}: {e}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
