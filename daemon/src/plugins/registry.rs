//! All plugins of the daemon by name, and what the rest of the daemon asks of them.
//!
//! Owns the map and the tasks in it. Changes of the map (reload, enable, disable, shutdown) exclude
//! each other; reading it, calling and notifying never wait for them.

use super::artifact::{PluginArtifact, PluginFailure};
use super::config::{self, Choices, ConfigError, ConfiguredPlugin, PluginConfig, PluginFile};
use super::entry::{Plugin, parsed};
use super::output::Output;
use super::process::{HostError, HostProcess, Launch};
use super::status::{PluginState, PluginStatus};
use fermata_protocol::error_chain;

use super::{blocking, supervisor, trust};
use fermata_plugin_api::message::CHECKPOINT_RESTORE;
use fermata_plugin_api::{CallError, Description, PluginKind, RestoreReply, RestoreRequest, SaveRequest, event_name};
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::task::JoinSet;
use tokio::time::timeout;

/// Why the plugins could not be started or changed.
#[derive(Debug, thiserror::Error)]
pub enum PluginError {
    /// Something on disk is in the way.
    #[error("the plugins' files cannot be used")]
    Config(#[from] ConfigError),
    /// There is no such plugin.
    #[error("there is no plugin `{name}`")]
    NoSuchPlugin {
        /// The name that was asked for.
        name: String,
    },
    /// The plugins have been shut down.
    #[error("the plugins are shut down")]
    ShutDown,
}

/// What a reload has changed, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ReloadReport {
    /// Plugins that were not there before.
    pub added: Vec<String>,
    /// Plugins whose file is gone; their hosts are ended.
    pub removed: Vec<String>,
    /// Plugins whose file or settings have changed, or that had failed: started afresh.
    pub restarted: Vec<String>,
    /// Plugins that run on undisturbed.
    pub kept: Vec<String>,
}

/// The plugins of the daemon. Cheap to clone.
#[derive(Clone)]
pub struct Plugins {
    inner: Arc<Inner>,
}

struct Inner {
    config: Arc<PluginConfig>,
    plugins: RwLock<BTreeMap<String, Arc<Plugin>>>,
    /// One permit: who has it may change the map. Closed by shutdown.
    changes: Semaphore,
}

impl Plugins {
    /// Finds the plugins and starts those that are enabled; does not wait for them.
    pub async fn start(config: PluginConfig) -> Result<Self, PluginError> {
        let plugins = Self {
            inner: Arc::new(Inner { config: Arc::new(config), plugins: RwLock::default(), changes: Semaphore::new(1) }),
        };
        plugins.reload().await?;
        Ok(plugins)
    }

    /// Lists all plugins in the order of their names.
    pub fn list(&self) -> Vec<PluginStatus> {
        self.snapshot().iter().map(|plugin| plugin.status()).collect()
    }

    /// Shows one plugin.
    pub fn get(&self, name: &str) -> Option<PluginStatus> {
        self.find(name).map(|plugin| plugin.status())
    }

    /// Waits until a plugin's status satisfies a condition, across restarts of its host.
    ///
    /// Returns `None` when there is no such plugin (any more).
    pub async fn wait_for(&self, name: &str, mut condition: impl FnMut(&PluginStatus) -> bool) -> Option<PluginStatus> {
        let plugin = self.find(name)?;
        let mut status = plugin.watch();
        // An error means that its task has ended, as on replacement.
        status.wait_for(|status| condition(status)).await.ok()?;
        Some(plugin.status())
    }

    /// Reads the plugin directories again: starts new and changed plugins, ends those that are gone.
    pub async fn reload(&self) -> Result<ReloadReport, PluginError> {
        let _permit = self.permit().await?;
        let config = Arc::clone(&self.inner.config);
        let (found, choices) = blocking(move || {
            let choices = Choices::load(&config)?;
            config::discover(&config).map(|found| (found, choices))
        })
        .await?;
        let mut report = ReloadReport::default();
        let mut gone: BTreeMap<String, Arc<Plugin>> =
            self.snapshot().into_iter().map(|plugin| (plugin.found.name.clone(), plugin)).collect();
        for found in found {
            let name = found.name.clone();
            match gone.remove(&name) {
                Some(old) if old.is_current(&found) => report.kept.push(name),
                old => {
                    let list = match old {
                        Some(_) => &mut report.restarted,
                        None => &mut report.added,
                    };
                    list.push(name.clone());
                    let choice = choices.get(&name);
                    self.replace(old, Some(found), choice).await;
                }
            }
        }
        for (name, old) in gone {
            report.removed.push(name);
            self.replace(Some(old), None, None).await;
        }
        Ok(report)
    }

    /// Switches a plugin on, for good; one in quarantine or failed gets a fresh start.
    pub async fn enable(&self, name: &str) -> Result<(), PluginError> {
        self.choose(name, true).await
    }

    /// Switches a plugin off, for good.
    pub async fn disable(&self, name: &str) -> Result<(), PluginError> {
        self.choose(name, false).await
    }

    async fn choose(&self, name: &str, enabled: bool) -> Result<(), PluginError> {
        let _permit = self.permit().await?;
        let old = self.find(name).ok_or_else(|| PluginError::NoSuchPlugin { name: name.to_owned() })?;
        let (config, key) = (Arc::clone(&self.inner.config), name.to_owned());
        blocking(move || Choices::load(&config)?.set(&config, &key, enabled)).await?;
        let fulfilled = match old.state() {
            PluginState::Running | PluginState::Starting => enabled,
            PluginState::Disabled => !enabled,
            PluginState::Quarantined | PluginState::Failed => false,
        };
        if !fulfilled {
            let found = old.found.clone();
            self.replace(Some(old), Some(found), Some(enabled)).await;
        }
        Ok(())
    }

    /// Loads a file in a throw-away host, and says what it describes itself as.
    pub async fn check(&self, path: &Path) -> Result<Description, CallError> {
        let name = config::plugin_name(path).ok_or_else(|| {
            CallError::new("bad_name", format!("{} is not named like a plugin", path.display()))
                .with_hint("plugins are files like libNAME.so")
        })?;
        let output = Output::new(&name);
        let launch = Launch { describe_only: true, ..Launch::new(&self.inner.config, path, None) };
        let broken = |error: HostError| CallError::new("crashed", error_chain(&error));
        let mut host = HostProcess::spawn(&launch, &output).map_err(broken)?;
        let limit = self.inner.config.start_deadline;
        let greeting = timeout(limit, supervisor::greet(&mut host, &output)).await;
        let error = match greeting {
            Ok(Ok(result)) => {
                host.close(self.inner.config.cancel_grace).await;
                return result;
            }
            Ok(Err(error)) => error,
            Err(_) => HostError::Silent(limit),
        };
        let ending = host.finish(&error).await;
        Err(CallError::new("crashed", format!("{}; {ending}", error_chain(&error))))
    }

    /// Says whether any plugin may have artifacts for a checkpoint.
    pub fn may_save(&self) -> bool {
        self.snapshot().iter().any(|plugin| plugin.may_offer(PluginKind::Checkpoint))
    }

    /// Asks every checkpoint plugin for its artifacts, all at once, each within its own deadline.
    ///
    /// `request.directory` must exist; each plugin gets a new directory of its own inside, which
    /// is removed if it fails. Plugins that don't offer this (with their settings) are left out.
    /// When this future is dropped, the running calls are cancelled.
    pub async fn checkpoint_save(&self, request: &SaveRequest) -> Vec<Result<PluginArtifact, PluginFailure>> {
        let mut tasks = JoinSet::new();
        for plugin in self.snapshot() {
            if plugin.may_offer(PluginKind::Checkpoint) {
                tasks.spawn(plugin.save(request.clone(), self.inner.config.cancel_grace));
            }
        }
        let mut results = BTreeMap::new();
        while let Some(joined) = tasks.join_next().await {
            match joined {
                Ok((plugin, Ok(artifacts))) => {
                    let artifacts = artifacts.into_iter().map(Ok).collect();
                    results.insert(plugin, artifacts);
                }
                Ok((_, Err(failure))) if failure.code == CallError::UNSUPPORTED => {}
                Ok((plugin, Err(failure))) => {
                    let failure = PluginFailure::new(&plugin, failure);
                    results.insert(plugin, vec![Err(failure)]);
                }
                Err(error) => {
                    // Only a panic of our own code; it must not cost the other plugins' results.
                    let failure = CallError::new("internal", error.to_string());
                    let failures = results.entry(String::new()).or_insert_with(Vec::new);
                    failures.push(Err(PluginFailure::new("", failure)));
                }
            }
        }
        results.into_values().flatten().collect()
    }

    /// Asks one plugin to bring back what it has saved; `request.directory` is its own directory.
    pub async fn checkpoint_restore(
        &self,
        plugin: &str,
        request: &RestoreRequest,
    ) -> Result<RestoreReply, PluginFailure> {
        let wrap = |failure| PluginFailure::new(plugin, failure);
        let found = self
            .find(plugin)
            .ok_or_else(|| wrap(CallError::new("no_such_plugin", format!("there is no plugin `{plugin}`"))))?;
        let grace = self.inner.config.cancel_grace;
        let reply = found.call(CHECKPOINT_RESTORE, request, grace).await;
        reply.and_then(|reply| parsed(&reply)).map_err(wrap)
    }

    /// Hands an event to every plugin that wants it; never waits, counts what it must drop.
    pub fn notify(&self, event: &Arc<Value>) {
        let name = event_name(event).unwrap_or_default();
        for plugin in self.snapshot() {
            plugin.notify(event, name);
        }
    }

    /// Ends all hosts and waits for them; nothing can be changed afterwards.
    pub async fn shutdown(&self) {
        // Closed first: a reload that is still running finishes, a later one is refused.
        let permit = self.inner.changes.acquire().await;
        self.inner.changes.close();
        drop(permit);
        let plugins = self.snapshot();
        for plugin in &plugins {
            plugin.cancel();
        }
        for plugin in plugins {
            plugin.ended().await;
        }
    }

    async fn permit(&self) -> Result<SemaphorePermit<'_>, PluginError> {
        let permit = self.inner.changes.acquire().await;
        permit.map_err(|_| PluginError::ShutDown)
    }

    fn snapshot(&self) -> Vec<Arc<Plugin>> {
        let plugins = self.inner.plugins.read();
        let plugins = plugins.unwrap_or_else(PoisonError::into_inner);
        plugins.values().cloned().collect()
    }

    fn find(&self, name: &str) -> Option<Arc<Plugin>> {
        let plugins = self.inner.plugins.read();
        let plugins = plugins.unwrap_or_else(PoisonError::into_inner);
        plugins.get(name).cloned()
    }

    /// Ends the old plugin, if any, and puts the new one, if any, in its place.
    async fn replace(&self, old: Option<Arc<Plugin>>, found: Option<ConfiguredPlugin>, choice: Option<bool>) {
        let name = old.as_ref().map(|old| old.found.name.clone());
        if let Some(old) = old {
            old.cancel();
            old.ended().await;
        }
        let new = match found {
            Some(found) => {
                let (found, file) = blocking(move || {
                    let file = read_file(&found);
                    (found, file)
                })
                .await;
                Some(Plugin::new(&self.inner.config, found, file, choice))
            }
            None => None,
        };
        let plugins = self.inner.plugins.write();
        let mut plugins = plugins.unwrap_or_else(PoisonError::into_inner);
        match (new, name) {
            (Some(new), _) => drop(plugins.insert(new.found.name.clone(), Arc::new(new))),
            (None, Some(name)) => drop(plugins.remove(&name)),
            (None, None) => {}
        }
    }
}

/// Reads a plugin's settings and looks at who could have written the plugin.
fn read_file(found: &ConfiguredPlugin) -> Result<PluginFile, ConfigError> {
    trust::trusted_file(&found.path)?;
    match &found.settings_file {
        Some(path) => config::read_plugin_file(path),
        None => Ok(PluginFile::default()),
    }
}
