//! The plugins of the daemon by name, and the functions through which the daemon uses them.
//!
//! Owns the map of plugins and their tasks. Changes of the map (reload, enable, disable, shutdown) exclude each other;
//! reading the map, calls and notifications never wait for them.

use super::artifact::{PluginArtifact, PluginFailure};
use super::config::{self, Choices, ConfiguredPlugin, PluginConfig, PluginConfigError, PluginFile};
use super::entry::{RegisteredPlugin, parsed};
use super::output::PluginOutput;
use super::process::{HostError, HostLaunch, HostProcess};
use super::status::{HostState, PluginStatus};
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
use tokio_util::task::TaskTracker;

/// Why the plugins could not be started or changed.
#[derive(Debug, thiserror::Error)]
pub enum PluginError {
    #[error("the plugins' files cannot be used")]
    Config(#[from] PluginConfigError),
    #[error("there is no plugin `{name}`")]
    NoSuchPlugin { name: String },
    #[error("the plugins are shut down")]
    ShutDown,
}

/// The changes of a reload, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ReloadReport {
    /// New plugins.
    pub added: Vec<String>,
    /// Plugins whose file is gone; their hosts are ended.
    pub removed: Vec<String>,
    /// Plugins whose file or settings have changed, or that had failed; they are started again.
    pub restarted: Vec<String>,
    /// Unchanged plugins; they run on.
    pub kept: Vec<String>,
}

/// The plugins of the daemon. Clones share them.
#[derive(Clone)]
pub struct Plugins {
    registry: Arc<Registry>,
}

struct Registry {
    config: Arc<PluginConfig>,
    plugins: RwLock<BTreeMap<String, Arc<RegisteredPlugin>>>,
    /// Its only permit is held during a change of the map, across awaits on purpose: a change reads files and waits for
    /// the end of hosts. It delays other changes and the shutdown, by at most the time that ending the replaced hosts
    /// takes, and nothing else. Closed by the shutdown.
    changes: Semaphore,
    /// The supervisors and the tasks that read the output of hosts.
    tasks: TaskTracker,
}

impl Plugins {
    /// Finds the plugins and starts those that are enabled; does not wait for their hosts.
    pub async fn start(config: PluginConfig) -> Result<Self, PluginError> {
        let registry = Registry {
            config: Arc::new(config),
            plugins: RwLock::default(),
            changes: Semaphore::new(1),
            tasks: TaskTracker::new(),
        };
        let plugins = Self { registry: Arc::new(registry) };
        plugins.reload().await?;
        Ok(plugins)
    }

    /// Returns the status of all plugins, ordered by name.
    pub fn list(&self) -> Vec<PluginStatus> {
        self.snapshot().iter().map(|plugin| plugin.status()).collect()
    }

    pub fn get(&self, name: &str) -> Option<PluginStatus> {
        self.find(name).map(|plugin| plugin.status())
    }

    /// Waits until a plugin's status satisfies a condition, across restarts of its host.
    ///
    /// Returns `None` when the plugin does not exist, or is removed or replaced meanwhile.
    pub async fn wait_for(&self, name: &str, mut condition: impl FnMut(&PluginStatus) -> bool) -> Option<PluginStatus> {
        let plugin = self.find(name)?;
        let mut status = plugin.watch();
        status.wait_for(|status| condition(status)).await.ok()?;
        Some(plugin.status())
    }

    /// Reads the plugin directories again: starts new plugins, restarts changed ones, ends those whose file is gone.
    pub async fn reload(&self) -> Result<ReloadReport, PluginError> {
        let _permit = self.permit().await?;
        let config = Arc::clone(&self.registry.config);
        let (found, choices) = blocking(move || {
            let choices = Choices::load(&config)?;
            config::discover(&config).map(|found| (found, choices))
        })
        .await?;
        let mut report = ReloadReport::default();
        let mut gone: BTreeMap<String, Arc<RegisteredPlugin>> =
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

    /// Enables a plugin permanently; one that is quarantined or failed is started again.
    pub async fn enable(&self, name: &str) -> Result<(), PluginError> {
        self.choose(name, true).await
    }

    /// Disables a plugin permanently.
    pub async fn disable(&self, name: &str) -> Result<(), PluginError> {
        self.choose(name, false).await
    }

    async fn choose(&self, name: &str, enabled: bool) -> Result<(), PluginError> {
        let _permit = self.permit().await?;
        let old = self.find(name).ok_or_else(|| PluginError::NoSuchPlugin { name: name.to_owned() })?;
        let (config, key) = (Arc::clone(&self.registry.config), name.to_owned());
        blocking(move || Choices::load(&config)?.set(&config, &key, enabled)).await?;
        let unchanged = match old.state() {
            HostState::Running | HostState::Starting => enabled,
            HostState::Disabled => !enabled,
            HostState::Quarantined | HostState::Failed => false,
        };
        if !unchanged {
            let found = old.found.clone();
            self.replace(Some(old), Some(found), Some(enabled)).await;
        }
        Ok(())
    }

    /// Loads a plugin in a host of its own that is ended afterwards, and returns the plugin's description.
    pub async fn check(&self, path: &Path) -> Result<Description, CallError> {
        let name = config::plugin_name(path).ok_or_else(|| {
            CallError::new("bad_name", format!("{} does not have the name of a plugin", path.display()))
                .with_hint("the file of a plugin is named libNAME.so")
        })?;
        let Registry { config, tasks, .. } = &*self.registry;
        let output = PluginOutput::new(&name);
        let launch = HostLaunch { describe_only: true, ..HostLaunch::new(config, tasks, path, None) };
        let not_spawned = |error: HostError| CallError::new("crashed", error_chain(&error));
        let mut host = HostProcess::spawn(&launch, &output).map_err(not_spawned)?;
        let limit = config.start_deadline;
        let error = match timeout(limit, supervisor::read_hello(&mut host, &output)).await {
            Ok(Ok(result)) => {
                host.close(config.cancel_grace).await;
                return result;
            }
            Ok(Err(error)) => error,
            Err(_) => HostError::StartTimeout(limit),
        };
        let exit = host.finish(&error).await;
        Err(CallError::new("crashed", format!("{}; {exit}", error_chain(&error))))
    }

    /// Returns whether a plugin may have artifacts for a checkpoint.
    pub fn may_save(&self) -> bool {
        self.snapshot().iter().any(|plugin| plugin.may_offer(PluginKind::Checkpoint))
    }

    /// Asks all checkpoint plugins for their artifacts concurrently, each within its own deadline.
    ///
    /// `request.directory` must exist; each plugin gets a new directory in it, which is removed if the plugin fails.
    /// Plugins that do not offer artifacts with their settings are left out. Dropping the future cancels the calls.
    pub async fn checkpoint_save(&self, request: &SaveRequest) -> Vec<Result<PluginArtifact, PluginFailure>> {
        let mut tasks = JoinSet::new();
        for plugin in self.snapshot() {
            if plugin.may_offer(PluginKind::Checkpoint) {
                tasks.spawn(plugin.save(request.clone(), self.registry.config.cancel_grace));
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
                    // A panic in the daemon's own code; the results of the other plugins are still used.
                    let failure = CallError::new("internal", error.to_string());
                    let failures = results.entry(String::new()).or_insert_with(Vec::new);
                    failures.push(Err(PluginFailure::new("", failure)));
                }
            }
        }
        results.into_values().flatten().collect()
    }

    /// Asks one plugin to restore its artifacts; `request.directory` is the directory of the plugin.
    pub async fn checkpoint_restore(
        &self,
        plugin: &str,
        request: &RestoreRequest,
    ) -> Result<RestoreReply, PluginFailure> {
        let wrap = |failure| PluginFailure::new(plugin, failure);
        let found = self
            .find(plugin)
            .ok_or_else(|| wrap(CallError::new("no_such_plugin", format!("there is no plugin `{plugin}`"))))?;
        let grace = self.registry.config.cancel_grace;
        let reply = found.call(CHECKPOINT_RESTORE, request, grace).await;
        reply.and_then(|reply| parsed(&reply)).map_err(wrap)
    }

    /// Queues an event for every plugin that subscribes to it; never waits.
    pub fn notify(&self, event: &Arc<Value>) {
        let name = event_name(event).unwrap_or_default();
        for plugin in self.snapshot() {
            plugin.notify(event, name);
        }
    }

    /// Ends all hosts and waits for all tasks. Later changes are refused.
    pub async fn shutdown(&self) {
        // Waits for a reload that is under way, and refuses later ones.
        let permit = self.registry.changes.acquire().await;
        self.registry.changes.close();
        drop(permit);
        let plugins = self.snapshot();
        for plugin in &plugins {
            plugin.cancel();
        }
        for plugin in plugins {
            plugin.ended().await;
        }
        self.registry.tasks.close();
        self.registry.tasks.wait().await;
    }

    async fn permit(&self) -> Result<SemaphorePermit<'_>, PluginError> {
        let permit = self.registry.changes.acquire().await;
        permit.map_err(|_| PluginError::ShutDown)
    }

    fn snapshot(&self) -> Vec<Arc<RegisteredPlugin>> {
        let plugins = self.registry.plugins.read();
        let plugins = plugins.unwrap_or_else(PoisonError::into_inner);
        plugins.values().cloned().collect()
    }

    fn find(&self, name: &str) -> Option<Arc<RegisteredPlugin>> {
        let plugins = self.registry.plugins.read();
        let plugins = plugins.unwrap_or_else(PoisonError::into_inner);
        plugins.get(name).cloned()
    }

    /// Ends the old plugin, if any, and starts the new one, if any, in its place. The caller has the permit.
    async fn replace(&self, old: Option<Arc<RegisteredPlugin>>, found: Option<ConfiguredPlugin>, choice: Option<bool>) {
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
                Some(RegisteredPlugin::new(&self.registry.config, &self.registry.tasks, found, file, choice))
            }
            None => None,
        };
        let plugins = self.registry.plugins.write();
        let mut plugins = plugins.unwrap_or_else(PoisonError::into_inner);
        match (new, name) {
            (Some(new), _) => drop(plugins.insert(new.found.name.clone(), Arc::new(new))),
            (None, Some(name)) => drop(plugins.remove(&name)),
            (None, None) => {}
        }
    }
}

/// Reads a plugin's settings file, after checking that no other user can change the plugin.
fn read_file(found: &ConfiguredPlugin) -> Result<PluginFile, PluginConfigError> {
    trust::trusted_file(&found.path)?;
    match &found.settings_file {
        Some(path) => config::read_plugin_file(path),
        None => Ok(PluginFile::default()),
    }
}
